"""What a training line may hold, and what its author reads when it is wrong."""

from __future__ import annotations

import io
import json
import pickle
from typing import Any

import pytest

from training.records import (
    ChatRecord,
    ClassificationRecord,
    CompletionRecord,
    PreferenceRecord,
    RecordError,
    TextRecord,
    iter_records,
    kind_of,
    parse_line,
    sequences_of,
)
from training.strict_json import MAX_LINE_BYTES

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yo"}


def call(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}} | changes


def chat(*messages: Any, **more: Any) -> bytes:
    return json.dumps({"messages": messages, **more}).encode()


def error_of(line: bytes, number: int = 3) -> str:
    with pytest.raises(RecordError) as caught:
        parse_line(line, number)
    assert caught.value.line == number
    return caught.value.message


def test_the_three_kinds_are_read() -> None:
    records = [
        parse_line(line, 1)
        for line in (chat(USER, ANSWER), b'{"prompt": "", "completion": "b"}', b'{"text": "t \xf0\x9f\x9a\x80"}')
    ]
    assert [kind_of(record) for record in records] == ["chat", "completion", "text"]
    assert records[1:] == [CompletionRecord(prompt="", completion="b"), TextRecord(text="t 🚀")]


def test_a_text_with_a_label_is_read() -> None:
    record = parse_line(b'{"text": " where is my card? ", "label": "card arrival"}', 1)
    assert record == ClassificationRecord(text=" where is my card? ", label="card arrival")
    assert kind_of(record) == "classification"
    assert sequences_of(record) == (record,)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "a", "label": 3}', 'label: 3 is not text; a label must be a string; write "3"'),
        (b'{"text": "a", "label": true}', "label: true is not text; a label must be a string"),
        (b'{"text": "a", "label": null}', "label: null is not text"),
        (b'{"text": "a", "label": ["x", "y"]}', 'label: ["x", "y"] is not text'),
        (b'{"text": "a", "label": ""}', "label: must not be empty"),
        (b'{"text": "a", "label": "spam "}', 'label: "spam " begins or ends with a blank'),
        (b'{"text": "a", "label": "a\\u0000b"}', "holds a line break or another character that cannot be shown"),
        (b'{"text": "a", "label": "' + b"x" * 300 + b'"}', "label: longer than 256 characters"),
        (b'{"text": " \\n", "label": "spam"}', "text: empty, nothing to classify"),
        (b'{"label": "spam"}', "text: missing"),
        (b'{"text": 1, "label": "spam"}', "text: 1 is not text"),
        (b'{"text": "a", "label": "spam", "weight": 2}', 'unknown key "weight"; known keys: text, label'),
        (b'{"text": "a", "lable": "spam"}', 'unknown key "lable"; did you mean "label"?'),
    ],
)
def test_a_faulty_label_or_text_is_explained(line: bytes, words: str) -> None:
    assert words in error_of(line)


def test_a_row_without_its_label_is_told_by_its_line() -> None:
    lines = b'{"text": "a", "label": "x"}\n{"text": "b"}\n'
    (_, first), (number, second) = iter_records(io.BytesIO(lines))
    assert isinstance(first, ClassificationRecord)
    assert number == 2
    assert str(second) == "line 2: a text record in a file that starts with classification (line 1)"


def test_a_tool_conversation_is_read_whole() -> None:
    result = {
        "role": "tool",
        "tool_call_id": "a",
        "content": [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}],
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    line = chat(
        {"role": "developer", "content": "d"},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call()], "weight": 0},
        result,
        {"role": "assistant", "refusal": "no", "content": None, "weight": 1},
        tools=[tool],
        parallel_tool_calls=False,
    )
    record = parse_line(line, 1)
    assert isinstance(record, ChatRecord)
    assert record.tools == (tool,)
    assert record.parallel_tool_calls is False
    assert [message.weight for message in record.messages] == [None, None, 0, None, 1]
    assert record.messages[2].tool_calls is not None
    assert record.messages[2].tool_calls[0].function.arguments == "{}"
    assert record.messages[3].content == "42"
    assert record.messages[4].refusal == "no"


def test_the_legacy_function_form_becomes_tools() -> None:
    record = parse_line(
        chat(
            USER,
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
            {"role": "function", "name": "f", "content": "1"},
            ANSWER,
            functions=[{"name": "f", "parameters": {}}],
        ),
        1,
    )
    assert isinstance(record, ChatRecord)
    assert record.tools == ({"type": "function", "function": {"name": "f", "parameters": {}}},)
    assert record.messages[1].tool_calls is not None
    assert record.messages[2].role == "tool"
    assert record.messages[2].tool_call_id == record.messages[1].tool_calls[0].id


def pair(
    asked: Any = None, better: Any = (ANSWER,), worse: Any = ({"role": "assistant", "content": "no"},), **more: Any
) -> bytes:
    asked = {"messages": [USER]} if asked is None else asked
    return json.dumps({"input": asked, "preferred_output": better, "non_preferred_output": worse, **more}).encode()


def test_a_preference_becomes_two_conversations_that_train_on_their_answers_alone() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    record = parse_line(pair({"messages": [USER, ANSWER, USER], "tools": [tool], "parallel_tool_calls": True}), 1)
    assert isinstance(record, PreferenceRecord)
    assert kind_of(record) == "preference"
    better, worse = sequences_of(record)
    assert isinstance(better, ChatRecord)
    assert isinstance(worse, ChatRecord)
    assert [message.weight for message in better.messages] == [None, 0, None, None]
    assert (better.messages[-1].content, worse.messages[-1].content) == ("yo", "no")
    assert better.messages[:-1] == worse.messages[:-1]
    assert (better.tools, better.parallel_tool_calls) == (worse.tools, worse.parallel_tool_calls) == ((tool,), True)


FAULTS: list[tuple[bytes, str]] = [
    (pair(worse=[ANSWER]), "non_preferred_output: the same as preferred_output, nothing to prefer"),
    (pair(better=[]), "preferred_output: the list is empty"),
    (pair(better=[ANSWER, ANSWER]), "preferred_output: must hold exactly one assistant message, it holds 2"),
    (pair(better=[USER]), "preferred_output[0].role: must be assistant"),
    (pair(worse=[{"role": "assistant", "content": 5}]), "non_preferred_output[0].content: 5 is not text"),
    (pair(better=[ANSWER | {"weight": 1}]), "preferred_output[0].weight: has no meaning here"),
    (pair({"messages": [USER, ANSWER]}), "input.messages[1].role: the assistant's answers are the outputs"),
    (pair({"messages": [USER, ANSWER | {"weight": 1}, USER]}), "input.messages: weight has no meaning here"),
    (pair({"messages": []}), "input.messages: the list is empty"),
    (pair({"messages": [{"role": "bot"}]}), 'input.messages[0].role: "bot" is not a role'),
    (pair({}), "input.messages: missing"),
    (pair("hi"), 'input: "hi" is not an object with messages'),
    (pair({"messages": [USER], "tools": [{}]}), 'input.tools[0].type: must be "function"'),
    (pair({"messages": [USER], "n": 1}), 'input: unknown key "n"'),
    (pair(note="x"), 'unknown key "note"'),
    (b'{"preferred_output": []}', "input: missing"),
    (b'{"input": {"messages": [{"role": "user", "content": "x"}]}, "preferred_output": []}', "the list is empty"),
    (b'{"prompt_": "a", "chosen": "b", "rejected": "c"}', 'rename "chosen" to "preferred_output"'),
    (
        chat(USER, {"role": "bot", "content": "x"}),
        'messages[1].role: "bot" is not a role; use system, developer, user,',
    ),
    (chat(USER, {"role": ["x"]}), 'messages[1].role: ["x"] is not a role'),
    (chat({"from": "human", "value": "x"}, ANSWER), 'messages[0].role: missing; rename "from" to "role"'),
    (chat({"role": "user"}, ANSWER), "messages[0].content: missing"),
    (chat({"role": "user", "content": None}, ANSWER), "messages[0].content: must be text, not null"),
    (chat({"role": "user", "content": 5}, ANSWER), "messages[0].content: 5 is not text"),
    (chat("hi", ANSWER), 'messages[0]: "hi" is not an object'),
    (chat(ANSWER, USER), "messages[1].role: the last message must be the assistant's"),
    (chat(), "messages: the list is empty"),
    (b'{"messages": {}}', "messages: must be a list"),
    (chat(USER, ANSWER | {"weight": 2}), "messages[1].weight: 2 is not 0 or 1"),
    (chat(USER, ANSWER | {"weight": True}), "messages[1].weight: true is not 0 or 1"),
    (chat(USER | {"weight": 1}, ANSWER), 'messages[0]: unknown key "weight" for role user'),
    (chat(USER, ANSWER | {"weight": 0}), "every assistant message has weight 0"),
    (chat(USER, ANSWER | {"contnet": "x"}), 'unknown key "contnet" for role assistant; did you mean "content"?'),
    (chat(USER, ANSWER, temperature=1), 'unknown key "temperature"; known keys: messages, tools'),
    (chat(USER, {"role": "assistant", "content": None}), "messages[1].content: must be text, unless"),
    (chat(USER, {"role": "assistant", "tool_calls": []}), "messages[1].tool_calls: the list is empty"),
    (
        chat(USER, {"role": "assistant", "tool_calls": [call(function={"name": "f", "arguments": {"a": 1}})]}),
        "messages[1].tool_calls[0].function.arguments: must be a JSON object written as a string",
    ),
    (
        chat(USER, {"role": "assistant", "tool_calls": [call(function={"name": "f", "arguments": "{'a'"})]}),
        "messages[1].tool_calls[0].function.arguments: must be a JSON object written as a string",
    ),
    (chat(USER, {"role": "assistant", "tool_calls": [call(), call()]}), "two calls share an id"),
    (chat(USER, {"role": "assistant", "tool_calls": [call(id="")]}), "tool_calls[0].id: must not be empty"),
    (chat(USER, {"role": "assistant", "tool_calls": [call(type="x")]}), 'tool_calls[0].type: must be "function"'),
    (chat(USER, {"role": "tool", "content": "x"}, ANSWER), "messages[1].tool_call_id: missing"),
    (
        chat(USER, {"role": "tool", "content": "x", "tool_call_id": "q"}, ANSWER),
        'messages[1].tool_call_id: no earlier assistant message has a tool call with id "q"',
    ),
    (
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER),
        'messages[0].content[0].type: "image_url" cannot be trained on',
    ),
    (chat({"role": "user", "content": [{"type": "text", "value": "x"}]}, ANSWER), 'content[0]: unknown key "value"'),
    (chat(USER, ANSWER, tools=[{"type": "function"}]), "tools[0].function: must be an object with a name"),
    (chat(USER, ANSWER, tools=[{"type": "function", "function": {"name": "a b"}}]), 'tools[0].function.name: "a b"'),
    (chat(USER, ANSWER, tools=[{}], functions=[{}]), "functions: is the older form of tools"),
    (chat(USER, ANSWER, parallel_tool_calls="yes"), "parallel_tool_calls: must be true or false"),
    (b'{"prompt": "a"}', "completion: missing"),
    (b'{"prompt": "a", "completion": null}', "completion: null is not text"),
    (b'{"prompt": "a", "completion": ""}', "completion: empty, nothing to train on"),
    (b'{"text": ""}', "text: empty, nothing to train on"),
    (
        b'{"question": "a", "answer": "b"}',
        '"messages" (chat), "prompt" and "completion", "text", "text" and "label" (classification), "anchor" and ',
    ),
    (b'{"text": "a", "text": "b"}', 'the key "text" appears twice'),
    (b'{"text": NaN}', "NaN is not JSON"),
    (b'{"text": -Infinity}', "-Infinity is not JSON"),
    (b'{"text": 1e999}', "the number 1e999 is too large"),
    (b'{"text": ' + b"9" * 5000 + b"}", "a number has too many digits"),
    (b'{"text": "\\ud800"}', "\\ud800 is half of a surrogate pair"),
    (b'{"text": "\xff"}', "not valid UTF-8 (byte 11 of the line)"),
    (b'{"text": "a', "the string that starts at column 10 is not closed"),
    (b'{"text": "a"', "the JSON object does not end on this line"),
    (b"{'text': 'a'}", "strings and keys need double quotes"),
    (b'{"text": "a"} {"text": "b"}', "put each object on its own line"),
    (b'[{"text": "a"}]', "this is a JSON array; one JSON object per line is needed, e.g. with: jq -c '.[]'"),
    (b"[" * 100_000, "nested deeper than 64 levels"),
    (b'{"a":' * 100_000, "nested deeper than 64 levels"),
    (b'{"text": ' + b"[" * 80 + b"]" * 80 + b"}", "nested deeper than 64 levels"),
    (b"5", "5 is not a JSON object"),
    (b"hello", 'not a JSON object: the line starts with "hello"'),
    (b"  ", "the line is empty"),
    (b'\xef\xbb\xbf{"text": "a"}', "not a JSON object"),  # a mark that is not at the file's start
]


@pytest.mark.parametrize(("line", "expected"), FAULTS, ids=[expected[:48] for _, expected in FAULTS])
def test_a_bad_line_is_explained(line: bytes, expected: str) -> None:
    assert expected in error_of(line)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"instruction,output\n", "looks like CSV"),
        ('{"text": "a"}'.encode("utf-16"), "UTF-16 text"),
        (b"\x1f\x8b\x08", "a gzip file"),
    ],
)
def test_a_file_that_is_no_jsonl_is_recognised_at_its_first_line(line: bytes, expected: str) -> None:
    assert expected in error_of(line, number=1)


def test_marks_line_ends_and_blank_lines_do_not_matter_and_numbers_stay_right() -> None:
    file = io.BytesIO(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\n  \n{"text": "c"}')
    assert list(iter_records(file)) == [(1, TextRecord(text="a")), (3, TextRecord(text="b")), (5, TextRecord(text="c"))]


def test_mixed_kinds_are_refused_at_the_line_that_differs() -> None:
    file = io.BytesIO(b'oops\n{"text": "a"}\n{"prompt": "p", "completion": "c"}\n{"text": "b"}\n')
    found = [(number, str(item)) for number, item in iter_records(file) if isinstance(item, RecordError)]
    assert [number for number, _ in found] == [1, 3]
    assert found[1][1] == "line 3: a completion record in a file that starts with text (line 2)"


def test_a_line_over_the_limit_is_one_fault_and_the_next_line_is_read() -> None:
    huge = b'{"text": "' + b"a" * (3 * MAX_LINE_BYTES) + b'"}\n'
    found = list(iter_records(io.BytesIO(huge + b'{"text": "b"}\n')))
    assert isinstance(found[0][1], RecordError)
    assert "longer than 10 MB" in found[0][1].message
    assert found[1] == (2, TextRecord(text="b"))


def test_an_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(RecordError(7, "text: missing")))
    assert (error.line, error.message, str(error)) == (7, "text: missing", "line 7: text: missing")
