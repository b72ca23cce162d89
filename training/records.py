"""Records: what one line of a training file may hold, and how a bad line is explained to its author.

Six kinds, never mixed in one file: chat (`messages`), completion (`prompt` and `completion`), text (`text`),
classification (`text` and `label`), pair (`anchor`, `positive` and, in all lines or in none, `negative`) and preference
(`input`, `preferred_output` and `non_preferred_output`). A chat record ends with an assistant message and trains on at
least one. The legacy `functions` / `function_call` form is read as tools. Whether a model's chat template can render a
record is `training.render`'s question; messages are read in `training.messages`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any, Literal

from training.messages import ChatMessage, FunctionCall, MessageReader, Role, ToolCall, read_messages, read_tools
from training.spec import Contract
from training.strict_json import (
    ARRAY,
    MAX_LINE_BYTES,
    Fault,
    check_keys,
    decode,
    filled_list,
    require,
    show,
    text_field,
)

__all__ = [
    "ChatMessage",
    "ChatRecord",
    "ClassificationRecord",
    "CompletionRecord",
    "FunctionCall",
    "PairRecord",
    "PreferenceRecord",
    "Record",
    "RecordError",
    "RecordKind",
    "Role",
    "TextRecord",
    "ToolCall",
    "WholeText",
    "first_record",
    "iter_records",
    "kind_of",
    "parse_line",
    "sequences_of",
]

RecordKind = Literal["chat", "completion", "text", "preference", "classification", "pair"]
MAX_LABEL_CHARS = 256


class ChatRecord(Contract):
    """A conversation; the loss is on assistant messages."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[dict[str, Any], ...] | None = None
    parallel_tool_calls: bool | None = None


class CompletionRecord(Contract):
    """A prompt and its completion; the loss is on the completion."""

    prompt: str
    completion: str


class TextRecord(Contract):
    """Plain text; the loss is on all of it."""

    text: str


class ClassificationRecord(Contract):
    """A text and the name of the class that it belongs to."""

    text: str
    label: str


class WholeText(Contract):
    """A text that is read by itself and not continued."""

    text: str


class PairRecord(Contract):
    """Two texts that belong together, and perhaps a third that does not belong to the first."""

    anchor: str
    positive: str
    negative: str | None = None

    def texts(self) -> tuple[WholeText, ...]:
        """What an encoder reads: anchor, positive, and the negative of a triplet."""
        return tuple(WholeText(text=text) for text in (self.anchor, self.positive, self.negative) if text is not None)


class PreferenceRecord(Contract):
    """A conversation and two answers to it, the better one and the worse one; only the answers are learned from."""

    messages: tuple[ChatMessage, ...]
    preferred: ChatMessage
    non_preferred: ChatMessage
    tools: tuple[dict[str, Any], ...] | None = None
    parallel_tool_calls: bool | None = None

    def sides(self) -> tuple[ChatRecord, ChatRecord]:
        """The conversation as it ends with each answer, the better one first; the loss is on the answer alone."""
        asked = [m.model_copy(update={"weight": 0}) if m.role == "assistant" else m for m in self.messages]
        better, worse = (
            ChatRecord(messages=(*asked, last), tools=self.tools, parallel_tool_calls=self.parallel_tool_calls)
            for last in (self.preferred, self.non_preferred)
        )
        return better, worse


Sequence = ChatRecord | CompletionRecord | TextRecord | ClassificationRecord | WholeText
Record = ChatRecord | CompletionRecord | TextRecord | ClassificationRecord | PreferenceRecord | PairRecord
SHAPES = (
    '"messages" (chat), "prompt" and "completion", "text", "text" and "label" (classification), '
    '"anchor" and "positive" (pair), or "input", "preferred_output" and "non_preferred_output" (preference)'
)


class RecordError(ValueError):
    """A line that cannot be used: its number (from 1) and what to mend."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(line, message)
        self.line = line
        self.message = message

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}"


def kind_of(record: Record) -> RecordKind:
    """The kind of a record; all records of a file share it."""
    return _KINDS[type(record)]


_KINDS: dict[type[Record], RecordKind] = {
    ChatRecord: "chat",
    CompletionRecord: "completion",
    TextRecord: "text",
    PreferenceRecord: "preference",
    ClassificationRecord: "classification",
    PairRecord: "pair",
}


def sequences_of(record: Record) -> tuple[Sequence, ...]:
    """What a model reads of a record: the record itself, the two sides of a preference, or the texts of a pair."""
    if isinstance(record, PreferenceRecord):
        return record.sides()
    return record.texts() if isinstance(record, PairRecord) else (record,)


def parse_line(line: bytes, number: int) -> Record:
    """The record on a line, its number counted from 1. Raises RecordError, and nothing else, on any bytes."""
    try:
        return _record(decode(line, first=number == 1))
    except Fault as fault:
        raise RecordError(number, str(fault)) from None


def iter_records(file: IO[bytes]) -> Iterator[tuple[int, Record | RecordError]]:
    """All lines of a JSONL file but the blank ones, one at a time: the number and the record, or what is wrong."""
    first: tuple[int, str] | None = None
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            _skip_rest(file, line)
        if not line.strip(b" \t\r\n"):
            continue
        try:
            record = parse_line(line, number)
            kind = _form(record)
            first = first or (number, kind)
            if kind != first[1]:
                raise RecordError(number, f"a {kind} record in a file that starts with {first[1]} (line {first[0]})")
        except RecordError as error:
            yield number, error
        else:
            yield number, record


def first_record(file: IO[bytes]) -> Record | None:
    """The first line's record; None if there is none, or it is no record."""
    found = next((record for _, record in iter_records(file)), None)
    return None if isinstance(found, RecordError) else found


def _form(record: Record) -> str:
    """What all records of a file share: the kind, and of pairs whether they have a negative."""
    return "triplet" if isinstance(record, PairRecord) and record.negative is not None else kind_of(record)


def _skip_rest(file: IO[bytes], part: bytes) -> None:
    while part and not part.endswith(b"\n"):
        part = file.readline(1 << 20)


def _record(value: Any) -> Record:
    if isinstance(value, list):
        raise Fault(ARRAY)
    if not isinstance(value, dict):
        raise Fault(f"{show(value)} is not a JSON object; a line must hold {SHAPES}")
    if "messages" in value:
        return _chat(value)
    if "preferred_output" in value or "non_preferred_output" in value:
        return _preference(value)
    if "prompt" in value or "completion" in value:
        check_keys(value, "", ("prompt", "completion"))
        prompt, completion = (text_field(value, "", key) for key in ("prompt", "completion"))
        require(completion, "completion: empty, nothing to train on")
        return CompletionRecord(prompt=prompt, completion=completion)
    if "anchor" in value or "positive" in value:
        return _pair(value)
    if "label" in value:
        return _classification(value)
    if "text" in value:
        check_keys(value, "", ("text", "label"))
        text = text_field(value, "", "text")
        require(text, "text: empty, nothing to train on")
        return TextRecord(text=text)
    raise Fault(_unknown_shape(value))


def _unknown_shape(value: dict[str, Any]) -> str:
    keys = set(value)
    if "conversations" in keys:
        hint = 'this looks like ShareGPT: rename "conversations" to "messages", "from" to "role", "value" to "content"'
    elif {"instruction", "output"} <= keys:
        hint = 'this looks like Alpaca: join "instruction" and "input" into "prompt", rename "output" to "completion"'
    elif {"question", "answer"} <= keys:
        hint = 'rename "question" to "prompt" and "answer" to "completion"'
    elif {"chosen", "rejected"} <= keys:
        hint = (
            'this looks like preference pairs: put the conversation into "input": {"messages": […]}, '
            'rename "chosen" to "preferred_output" and "rejected" to "non_preferred_output", each a list of one message'
        )
    else:
        hint = ""
    found = f"keys {', '.join(show(key) for key in list(value)[:6])}" if value else "no keys"
    return f"unknown record shape with {found}; a line must hold {SHAPES}{'; ' + hint if hint else ''}"


def _chat(value: dict[str, Any]) -> ChatRecord:
    check_keys(value, "", ("messages", "tools", "parallel_tool_calls", "functions"))
    messages = read_messages(value, "")
    last = messages[-1]
    require(last.role == "assistant", f"messages[{len(messages) - 1}].role: the last message must be the assistant's")
    trained = [message for message in messages if message.role == "assistant" and message.weight != 0]
    require(trained, "messages: every assistant message has weight 0, nothing to train on")
    tools, parallel = read_tools(value, "")
    return ChatRecord(messages=messages, tools=tools, parallel_tool_calls=parallel)


def _classification(value: dict[str, Any]) -> ClassificationRecord:
    check_keys(value, "", ("text", "label"))
    text = text_field(value, "", "text")
    require(text.strip(), "text: empty, nothing to classify")
    label = value["label"]
    if not isinstance(label, str):
        as_text = f"; write {show(str(label))}" if isinstance(label, int) and not isinstance(label, bool) else ""
        raise Fault(f"label: {show(label)} is not text; a label must be a string{as_text}")
    require(label, "label: must not be empty")
    require(label == label.strip(), f"label: {show(label)} begins or ends with a blank; two labels must not look alike")
    require(label.isprintable(), f"label: {show(label)} holds a line break or another character that cannot be shown")
    require(len(label) <= MAX_LABEL_CHARS, f"label: longer than {MAX_LABEL_CHARS} characters")
    return ClassificationRecord(text=text, label=label)


def _pair(value: dict[str, Any]) -> PairRecord:
    check_keys(value, "", ("anchor", "positive", "negative"))
    anchor, positive = (text_field(value, "", key) for key in ("anchor", "positive"))
    negative = text_field(value, "", "negative") if "negative" in value else None
    for key, text in (("anchor", anchor), ("positive", positive), ("negative", negative)):
        require(text is None or text.strip(), f"{key}: empty, nothing to embed")
    require(positive != anchor, "positive: the same as anchor, nothing to learn")
    require(negative not in (anchor, positive), "negative: the same as anchor or positive")
    return PairRecord(anchor=anchor, positive=positive, negative=negative)


def _preference(value: dict[str, Any]) -> PreferenceRecord:
    check_keys(value, "", ("input", "preferred_output", "non_preferred_output"))
    asked = value.get("input")
    if not isinstance(asked, dict):
        raise Fault(f"input: {show(asked)} is not an object with messages" if "input" in value else "input: missing")
    check_keys(asked, "input", ("messages", "tools", "parallel_tool_calls"))
    messages = read_messages(asked, "input.")
    last = f"input.messages[{len(messages) - 1}].role"
    require(messages[-1].role != "assistant", f"{last}: the assistant's answers are the outputs; end before them")
    weighted = any(message.weight is not None for message in messages)
    require(not weighted, "input.messages: weight has no meaning here, only the two outputs are learned from")
    preferred, non_preferred = (_output(value, key) for key in ("preferred_output", "non_preferred_output"))
    require(preferred != non_preferred, "non_preferred_output: the same as preferred_output, nothing to prefer")
    tools, parallel = read_tools(asked, "input.")
    return PreferenceRecord(
        messages=messages,
        preferred=preferred,
        non_preferred=non_preferred,
        tools=tools,
        parallel_tool_calls=parallel,
    )


def _output(value: dict[str, Any], key: str) -> ChatMessage:
    """The one assistant message of an output."""
    require(key in value, f"{key}: missing")
    items = filled_list(value[key], key)
    require(len(items) == 1, f"{key}: must hold exactly one assistant message, it holds {len(items)}")
    message = MessageReader().read(items[0], f"{key}[0]")
    require(message.role == "assistant", f"{key}[0].role: must be assistant")
    require(message.weight is None, f"{key}[0].weight: has no meaning here, both outputs are learned from")
    return message
