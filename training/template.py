"""Chat templates: messages to text, and where in that text each assistant turn lies. Knows no tokens.

A template is a program by strangers. It runs in transformers' sandbox; what it raises becomes a RenderError; and what
it silently leaves out is found by planting marks (private-use characters) in the messages and looking for them in the
text. The same marks give the place of each turn, however the template strips, moves or rewrites it.
Imports neither torch nor the tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from training.marks import Conversation, Message, common_prefix, free_marks, plant, read_marks, renamed

Span = tuple[int, int]

# Around control tokens in user text, as transformers' `mark_control_tokens` writes them.
TOKEN_START, TOKEN_END = "\U000f0000", "\U000f0001"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Whatever a stranger's template can raise through the sandbox; all of it is the template's doing, or the messages'.
_TEMPLATE_FAULTS = (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError)


class RenderError(ValueError):
    """A record or a prompt that this base's chat template cannot express; the message is for the user."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


@dataclass
class _Traces:
    """Where planted marks came out: per message the least and greatest position in the text without marks."""

    text: str
    content_starts: dict[int, int] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)
    calls: dict[int, int] = field(default_factory=dict)  # message -> number of its tool calls seen
    num_tools: int = 0

    def start(self, index: int) -> int:
        return self.content_starts.get(index, self.ends[index])


class ChatTemplate:
    """One base's template with its special tokens."""

    def __init__(
        self,
        source: str,
        tool_source: str | None,
        variables: dict[str, str],
        added_tokens: dict[str, bool],  # text -> whether special
        stop_tokens: set[str],
    ) -> None:
        self.source = source
        self.tool_source = tool_source
        self._variables = variables
        specials = {token for token, special in added_tokens.items() if special}
        # As transformers' sanitize_control_tokens: special tokens, and added ones that the template itself writes.
        control = {t for t, special in added_tokens.items() if special or (t in source and not t.isspace())}
        self._control = re.compile(_either(control | stop_tokens))
        # A reasoning or tool-call tag (added, not special) in an assistant turn is the model's own output: it stays.
        self._assistant_control = re.compile(_either(specials | stop_tokens))
        self._stop = re.compile(f"(?<!{TOKEN_START})(?:{_either(stop_tokens)})")
        self._special = re.compile(f"(?<!{TOKEN_START})(?:{_either(specials)})")
        self._border = re.compile(f"{_either(set(added_tokens))}|\n")
        self._generation_prompt: str | None = None

    # -- rendering ---------------------------------------------------------------------------------------------------

    def prompt(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> str:
        """The text to continue. RenderError if the template refuses the conversation or drops part of it."""
        return self._first_that_renders(messages, tools, lambda chat: self._checked(chat, True).text)

    def example(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, trained: list[bool]
    ) -> tuple[str, list[Span]]:
        """The text of a whole conversation, and the character spans of the assistant turns marked as trained."""

        def render(chat: Conversation) -> tuple[str, list[Span]]:
            traces = self._checked(chat, False)
            return traces.text, self._spans(chat, traces, trained)

        return self._first_that_renders(messages, tools, render)

    def _first_that_renders(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, render: Callable[[Conversation], Any]
    ) -> Any:
        """Try the forms that templates want messages in, most usual first; of the errors the most telling is raised."""
        errors: list[RenderError] = []
        for chat in self._forms(messages, tools):
            try:
                return render(chat)
            except RenderError as error:
                errors.append(error)
        # A template's own raise_exception and what we found dropped say more than a TypeError inside a template.
        raise next((error for error in errors if type(error.__cause__) in (NoneType, TemplateError)), errors[0])

    def _forms(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> Iterator[Conversation]:
        """Forms in a fixed order, so that training and serving pick the same: tool arguments as objects (what templates
        of today expect) or as text, and messages without content with the key absent or empty. A developer message is
        a system message to a template that does not know the role."""
        has_calls = any(message.get("tool_calls") for message in messages)
        has_developer = any(message["role"] == "developer" for message in messages)
        knows_developer = "developer" in (self.tool_source if tools and self.tool_source else self.source)
        for developer_as_system in [False, True] if knows_developer and has_developer else [True]:
            for parse_arguments in [True, False] if has_calls else [True]:
                for fill_content in [False, True] if has_calls else [True]:
                    yield Conversation(
                        [self._message(m, developer_as_system, parse_arguments, fill_content) for m in messages],
                        self._sanitise(tools, self._control) if tools else None,
                    )

    def _message(
        self, message: Message, developer_as_system: bool, parse_arguments: bool, fill_content: bool
    ) -> Message:
        """One message as templates take it: no None values (as transformers does), no fields of training only."""
        out = {key: value for key, value in message.items() if value is not None and key not in ("weight", "refusal")}
        if "content" not in out and message.get("refusal"):
            out["content"] = message["refusal"]
        if isinstance(out.get("content"), list):
            out["content"] = "".join(_text_of(part) for part in out["content"])
        if "content" not in out and fill_content:
            out["content"] = ""
        if out["role"] == "developer" and developer_as_system:
            out["role"] = "system"
        if parse_arguments and out.get("tool_calls"):
            out["tool_calls"] = [_with_parsed_arguments(call) for call in out["tool_calls"]]
        return self._sanitise(out, self._assistant_control if out["role"] == "assistant" else self._control)

    def _sanitise(self, value: Any, control: re.Pattern[str]) -> Any:
        """Wrap control tokens in user text, keys included, so that they are later encoded as plain text."""
        if isinstance(value, str):
            value = value.replace(TOKEN_START, "").replace(TOKEN_END, "")
            return control.sub(f"{TOKEN_START}\\g<0>{TOKEN_END}", value)
        if isinstance(value, dict):
            return {self._sanitise(key, control): self._sanitise(item, control) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._sanitise(item, control) for item in value]
        return value

    def _render(self, chat: Conversation, generation_prompt: bool, *, mask: bool = False) -> tuple[str, list[Span]]:
        source = self.tool_source if chat.tools and self.tool_source else self.source
        options: dict[str, Any] = {**self._variables, "tools": chat.tools, "add_generation_prompt": generation_prompt}
        try:
            out: Any = render_jinja_template(
                [chat.messages], chat_template=source, return_assistant_tokens_mask=mask, **options
            )
        except _TEMPLATE_FAULTS as error:
            raise RenderError(f"the chat template refuses this conversation: {error}") from error
        texts, blocks = out
        return texts[0], blocks[0] if mask else []

    # -- what a template drops -----------------------------------------------------------------------------------------

    def _checked(self, chat: Conversation, generation_prompt: bool) -> _Traces:
        """Render, and refuse if a turn, a tool call or the tools do not show in the text."""
        text, _ = self._render(chat, generation_prompt)
        traces = self._trace(chat, text, generation_prompt)
        for index, message in enumerate(chat.messages):
            role, calls = message["role"], message.get("tool_calls") or []
            if message.get("content", "").strip() and index not in traces.content_starts and index not in traces.ends:
                self._locate(chat, traces, index, generation_prompt, _other_content, f"the content of {role} messages")
            if calls and traces.calls.get(index, 0) < len(calls):
                self._locate(chat, traces, index, generation_prompt, _other_call, f"the tool calls of {role} messages")
        if chat.tools and traces.num_tools < len(chat.tools):
            without = Conversation(chat.messages, [renamed(tool) for tool in chat.tools])
            if self._render(without, generation_prompt)[0] == text:
                raise RenderError("the chat template ignores tools; this base cannot be told about them")
        return traces

    def _locate(
        self, chat: Conversation, traces: _Traces, index: int, generation_prompt: bool,
        change: Callable[[Message, str], Message], what: str,
    ) -> None:  # fmt: skip
        """Find a message whose marks were lost by changing it and comparing texts; RenderError if nothing changes."""
        others = []
        for word in ("Quartz one", "marble twO"):
            messages = [change(m, word) if i == index else m for i, m in enumerate(chat.messages)]
            others.append(self._render(Conversation(messages, chat.tools), generation_prompt)[0])
        if all(other == traces.text for other in others):
            raise RenderError(f"the chat template drops {what}: records that differ only there would look the same")
        texts = [traces.text, *others]
        start = common_prefix(texts)
        end = len(traces.text) - common_prefix([text[start:][::-1] for text in texts])
        traces.content_starts[index] = min(start, traces.content_starts.get(index, start))
        traces.ends[index] = max(end, traces.ends.get(index, end))

    def _trace(self, chat: Conversation, text: str, generation_prompt: bool) -> _Traces:
        """Plant marks in every message and tool, render again, and read where they came out."""
        traces = _Traces(text)
        num_calls = sum(len(message.get("tool_calls") or []) for message in chat.messages)
        num_marks = 2 * len(chat.messages) + num_calls + len(chat.tools or [])
        base = free_marks(text, num_marks)
        if base is None:
            return traces
        marked_chat, meanings = plant(chat, base)
        try:
            marked, _ = self._render(marked_chat, generation_prompt)
        except RenderError:
            return traces  # the template looks into the content; places are then found by comparing texts
        clean, found = read_marks(marked, base, num_marks)
        same = clean == text
        for number, position in found:
            kind, index = meanings[number]
            if kind == "tool":
                traces.num_tools += 1
                continue
            if kind == "call":
                traces.calls[index] = traces.calls.get(index, 0) + 1
            if not same:
                continue
            if kind == "start":
                traces.content_starts.setdefault(index, position)
            traces.ends[index] = max(position, traces.ends.get(index, position))
        return traces

    # -- where the assistant's turns lie -------------------------------------------------------------------------------

    def _spans(self, chat: Conversation, traces: _Traces, trained: list[bool]) -> list[Span]:
        turns = [index for index, message in enumerate(chat.messages) if message["role"] == "assistant"]
        source = self.tool_source if chat.tools and self.tool_source else self.source
        if _GENERATION.search(source):
            return self._marked_spans(chat, turns, trained)
        return [self._span(chat, traces, index) for index in turns if trained[index]]

    def _marked_spans(self, chat: Conversation, turns: list[int], trained: list[bool]) -> list[Span]:
        """Spans by the template's own {% generation %} blocks, each with the stop token that follows directly."""
        text, blocks = self._render(chat, False, mask=True)
        if len(blocks) != len(turns):
            if not all(trained[index] for index in turns):
                raise RenderError(
                    "weight 0 cannot be honoured: the template's generation blocks do not match the turns"
                )
            chosen = blocks
        else:
            chosen = [block for index, block in zip(turns, blocks, strict=True) if trained[index]]
        return [(start, self._with_stop(text, end)) for start, end in chosen]

    def _with_stop(self, text: str, end: int) -> int:
        follows = self._stop.match(text, end)
        return follows.end() if follows and follows.group() else end

    def _span(self, chat: Conversation, traces: _Traces, index: int) -> Span:
        """One assistant turn: from where its generation prompt ends to its stop token."""
        if index not in traces.ends:  # nothing of it was marked, for instance because its content is empty
            change = _other_call if chat.messages[index].get("tool_calls") else _other_content
            self._locate(chat, traces, index, False, change, "assistant messages")
        text, first, last = traces.text, traces.start(index), traces.ends[index]
        before = max((end for i, end in traces.ends.items() if i != index and end <= first), default=0)
        after = min((traces.start(i) for i in traces.ends if i != index and traces.start(i) >= last), default=len(text))
        return self._turn_start(chat, traces, index, before, first), self._turn_end(text, last, after)

    def _turn_start(self, chat: Conversation, traces: _Traces, index: int, before: int, first: int) -> int:
        """Where serving would hand over to the model: after the header that the generation prompt consists of."""
        text = traces.text
        header = self.generation_prompt()
        at = text.find(header, before, first) if header else -1
        if at >= 0:
            return at + len(header)
        try:
            ahead = Conversation(chat.messages[:index], chat.tools)
            prompt, _ = self._render(ahead, True)
        except RenderError:
            prompt = ""
        if prompt and text.startswith(prompt) and before <= len(prompt) <= first:
            return len(prompt)
        if prompt and ahead.messages:
            ends = self._trace(ahead, prompt, True).ends
            tail = prompt[ends[index - 1] :] if index - 1 in ends else ""
            # The prompt may already open a thought that this turn does not have: then the header before it is shared.
            shared = common_prefix([tail, text[before:first]])
            borders = [0, *(m.end() for m in self._border.finditer(tail)), len(tail)]
            if (length := max(border for border in borders if border <= shared)) > 0:
                return before + length
        if index not in traces.content_starts:
            raise RenderError("cannot tell where an assistant turn begins in the text that the chat template writes")
        return len(text[:first].rstrip(" ")) if first > before else first

    def _turn_end(self, text: str, last: int, after: int) -> int:
        """Past the first stop token behind the content; else past another special token; else past the newline."""
        for pattern in (self._stop, self._special):
            found = pattern.search(text, last, after)
            if found and found.group():
                return found.end()
        return last + 1 if text[last : last + 1] == "\n" else last

    def generation_prompt(self) -> str:
        """What the template adds for the model to continue after a user message, for example a role header."""
        if self._generation_prompt is None:
            chat = Conversation([{"role": "user", "content": "Hello"}], None)
            try:
                with_prompt, without = self._render(chat, True)[0], self._render(chat, False)[0]
            except RenderError:
                with_prompt = without = ""
            self._generation_prompt = with_prompt[common_prefix([with_prompt, without]) :]
        return self._generation_prompt

    def turn_end(self) -> str | None:
        """The special token that the template puts directly behind an answer, if it puts one."""
        messages: list[Message] = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Quartz"}]
        try:
            text, _ = self._render(Conversation(messages, None), False)
        except RenderError:
            return None
        tail = text[text.rfind("Quartz") + len("Quartz") :].lstrip() if "Quartz" in text else ""
        found = self._special.match(tail)
        return found.group() if found and found.group() else None


def _other_content(message: Message, word: str) -> Message:
    return {**message, "content": word}


def _other_call(message: Message, word: str) -> Message:
    return {**message, "tool_calls": [renamed(call, word.replace(" ", "_")) for call in message["tool_calls"]]}


def _with_parsed_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """OpenAI writes arguments as JSON text; templates of today expect the object."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _text_of(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise RenderError("only text parts can be given to this base")


def _either(tokens: set[str]) -> str:
    """A pattern for any of the tokens, longer ones first; one that never matches if there are none."""
    return "|".join(map(re.escape, sorted(tokens, key=lambda token: (-len(token), token)))) or "(?!)"
