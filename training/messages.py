"""Messages: one turn of a conversation, the tools that it may call, and how they are read from a line's JSON."""

from __future__ import annotations

import re
from typing import Any, Literal

from training.spec import Contract
from training.strict_json import (
    Fault,
    check_keys,
    decode,
    filled_field,
    filled_list,
    optional_text,
    rename_hint,
    require,
    show,
    text_field,
)

Role = Literal["system", "developer", "user", "assistant", "tool"]


class FunctionCall(Contract):
    """The function an assistant calls; `arguments` is JSON text of an object."""

    name: str
    arguments: str


class ToolCall(Contract):
    """One call in an assistant message."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(Contract):
    """One turn. `weight` 0 keeps an assistant message out of the loss; `refusal` is its text when it declines."""

    role: Role
    content: str | None = None
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    tool_call_id: str | None = None
    weight: Literal[0, 1] | None = None
    refusal: str | None = None


def read_messages(value: dict[str, Any], prefix: str) -> tuple[ChatMessage, ...]:
    """The conversation under the key `messages`; `prefix` is what stands before the key in a fault."""
    path = f"{prefix}messages"
    require("messages" in value, f"{path}: missing")
    reader = MessageReader()
    return tuple(
        reader.read(item, f"{path}[{index}]") for index, item in enumerate(filled_list(value["messages"], path))
    )


class MessageReader:
    """Reads the messages of one record in order, remembering the calls that tool messages may answer."""

    def __init__(self) -> None:
        self.call_ids: set[str] = set()
        self.legacy_calls: dict[str, str] = {}  # function name -> id that we gave its latest call

    def read(self, item: Any, path: str) -> ChatMessage:
        """One message, or a Fault that names the field."""
        if not isinstance(item, dict):
            raise Fault(f"{path}: {show(item)} is not an object with role and content")
        role = item.get("role")
        require("role" in item, f"{path}.role: missing{rename_hint(item, {'from': 'role'})}")
        if role == "function":
            return self._function_result(item, path)
        if not isinstance(role, str) or role not in _ROLE_KEYS:
            raise Fault(f"{path}.role: {show(role)} is not a role; use system, developer, user, assistant or tool")
        check_keys(item, path, _ROLE_KEYS[role], f" for role {role}")
        fields: dict[str, Any] = {"role": role, "name": optional_text(item, path, "name")}
        if role == "assistant":
            fields |= self._assistant(item, path)
        else:
            fields["content"] = _content(item, path)
            require(fields["content"] is not None, f"{path}.content: must be text, not null")
        if role == "tool":
            fields["tool_call_id"] = self._answered(item, path)
        return ChatMessage(**fields)

    def _assistant(self, item: dict[str, Any], path: str) -> dict[str, Any]:
        calls = self._calls(item, path)
        has_text = item.get("content") is not None or item.get("refusal") is not None
        require(has_text or calls, f"{path}.content: must be text, unless the message has tool_calls or a refusal")
        weight = item.get("weight")
        if weight not in (None, 0, 1) or isinstance(weight, bool):
            raise Fault(f"{path}.weight: {show(weight)} is not 0 or 1")
        return {
            "content": _content(item, path) if item.get("content") is not None else None,
            "refusal": optional_text(item, path, "refusal"),
            "tool_calls": calls,
            "weight": None if weight is None else int(weight),
        }

    def _calls(self, item: dict[str, Any], path: str) -> tuple[ToolCall, ...] | None:
        legacy = item.get("function_call")
        if item.get("tool_calls") is None:
            return None if legacy is None else (self._legacy_call(legacy, f"{path}.function_call"),)
        require(legacy is None, f"{path}: has both tool_calls and the older function_call; keep tool_calls")
        listed = filled_list(item["tool_calls"], f"{path}.tool_calls")
        calls = tuple(self._call(call, f"{path}.tool_calls[{index}]") for index, call in enumerate(listed))
        ids = {call.id for call in calls}
        require(len(ids) == len(calls), f"{path}.tool_calls: two calls share an id; each needs its own")
        self.call_ids |= ids
        return calls

    def _call(self, value: Any, path: str) -> ToolCall:
        if not isinstance(value, dict):
            raise Fault(f"{path}: {show(value)} is not an object")
        check_keys(value, path, ("id", "type", "function"))
        call_id = filled_field(value, path, "id")
        require(value.get("type") == "function", f'{path}.type: must be "function"')
        return ToolCall(id=call_id, function=_function_call(value.get("function"), f"{path}.function"))

    def _legacy_call(self, value: Any, path: str) -> ToolCall:
        function = _function_call(value, path)
        call_id = f"call_{len(self.call_ids)}"
        self.call_ids.add(call_id)
        self.legacy_calls[function.name] = call_id
        return ToolCall(id=call_id, function=function)

    def _answered(self, item: dict[str, Any], path: str) -> str:
        call_id = filled_field(item, path, "tool_call_id")
        if call_id not in self.call_ids:
            raise Fault(f"{path}.tool_call_id: no earlier assistant message has a tool call with id {show(call_id)}")
        return call_id

    def _function_result(self, item: dict[str, Any], path: str) -> ChatMessage:
        check_keys(item, path, ("role", "content", "name"), " for role function")
        name = filled_field(item, path, "name")
        if name not in self.legacy_calls:
            raise Fault(f"{path}.name: no earlier assistant message has a function_call of {show(name)}")
        require(item.get("content") is not None, f"{path}.content: must be text, not null")
        return ChatMessage(role="tool", content=_content(item, path), name=name, tool_call_id=self.legacy_calls[name])


_ROLE_KEYS: dict[str, tuple[str, ...]] = {
    "system": ("role", "content", "name"),
    "developer": ("role", "content", "name"),
    "user": ("role", "content", "name"),
    "assistant": ("role", "content", "name", "tool_calls", "weight", "refusal", "function_call"),
    "tool": ("role", "content", "name", "tool_call_id"),
}
_FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


def _function_call(value: Any, path: str) -> FunctionCall:
    require(isinstance(value, dict), f"{path}: must be an object with name and arguments")
    check_keys(value, path, ("name", "arguments"))
    name, arguments = filled_field(value, path, "name"), value.get("arguments")
    problem = f"{path}.arguments: must be a JSON object written as a string, e.g. " + r'"{\"altitude\": 100}"'
    require(isinstance(arguments, str), problem)
    try:
        parsed = decode(str(arguments).encode())
    except Fault as fault:
        raise Fault(f"{problem} ({fault})") from None
    require(isinstance(parsed, dict), problem)
    return FunctionCall(name=name, arguments=str(arguments))


def read_tools(value: dict[str, Any], prefix: str) -> tuple[tuple[dict[str, Any], ...] | None, bool | None]:
    """The tools of a conversation, in the older form too, and whether their calls may be parallel."""
    parallel = value.get("parallel_tool_calls")
    require(parallel is None or isinstance(parallel, bool), f"{prefix}parallel_tool_calls: must be true or false")
    tools, functions = value.get("tools"), value.get("functions")
    if tools is None and functions is None:
        return None, parallel
    require(tools is None or functions is None, "functions: is the older form of tools; keep only tools")
    if tools is None:
        old = filled_list(functions, "functions")
        listed = [_function(item, f"functions[{index}]") for index, item in enumerate(old)]
        return tuple({"type": "function", "function": function} for function in listed), parallel
    for index, tool in enumerate(filled_list(tools, f"{prefix}tools")):
        _check_tool(tool, f"{prefix}tools[{index}]")
    return tuple(tools), parallel


def _check_tool(tool: Any, path: str) -> None:
    if not isinstance(tool, dict):
        raise Fault(f"{path}: {show(tool)} is not an object with type and function")
    check_keys(tool, path, ("type", "function"))
    require(tool.get("type") == "function", f'{path}.type: must be "function"')
    _function(tool.get("function"), f"{path}.function")


def _function(value: Any, path: str) -> dict[str, Any]:
    require(isinstance(value, dict), f"{path}: must be an object with a name, and description and parameters if any")
    check_keys(value, path, ("name", "description", "parameters", "strict"))
    name = filled_field(value, path, "name")
    if not _FUNCTION_NAME.fullmatch(name):
        raise Fault(f"{path}.name: {show(name)} is not 1 to 64 letters, digits, dots, dashes and underscores")
    optional_text(value, path, "description")
    parameters = value.get("parameters")
    require(parameters is None or isinstance(parameters, dict), f"{path}.parameters: must be a JSON schema object")
    strict = value.get("strict")
    require(strict is None or isinstance(strict, bool), f"{path}.strict: must be true or false")
    return value


def _content(item: dict[str, Any], path: str) -> str | None:
    """Text of a message; a list of text parts is joined, other parts are refused."""
    require("content" in item, f"{path}.content: missing{rename_hint(item, {'value': 'content', 'text': 'content'})}")
    content = item["content"]
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Fault(f"{path}.content: {show(content)} is not text")
    parts = filled_list(content, f"{path}.content")
    return "".join(_part(part, f"{path}.content[{index}]") for index, part in enumerate(parts))


def _part(part: Any, path: str) -> str:
    require(isinstance(part, dict), f'{path}: must be {{"type": "text", "text": …}}')
    kind = part.get("type")
    if isinstance(kind, str) and kind.startswith(("image", "input_audio", "audio", "video", "file")):
        raise Fault(f"{path}.type: {show(kind)} cannot be trained on; only text parts are accepted")
    require(kind == "text", f'{path}.type: {show(kind)} is not a part type; only "text" is accepted')
    check_keys(part, path, ("type", "text"))
    return text_field(part, path, "text")
