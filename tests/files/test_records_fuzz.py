"""Whatever bytes a line holds, it is a record or a RecordError, and nothing else."""

from __future__ import annotations

import io
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from service.files.validation import Report, validate
from training.records import Record, RecordError, iter_records, kind_of, parse_line

# The keys that the parser looks for come often, so that fuzzing gets past the first check.
KEYS = st.sampled_from(
    [
        *("messages", "role", "content", "weight", "tool_calls", "tool_call_id", "refusal", "function_call"),
        *("tools", "functions", "parallel_tool_calls", "strict", "parameters", "function", "name", "arguments"),
        *("prompt", "completion", "text", "label", "id", "type"),
        *("anchor", "positive", "negative"),
    ]
) | st.text(max_size=5)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(["user", "assistant", "tool", "function", "system", "{}", "text", "image_url"])
)
JSON = st.recursive(
    LEAVES, lambda below: st.lists(below, max_size=4) | st.dictionaries(KEYS, below, max_size=5), max_leaves=25
)

untimed = settings(deadline=None)  # the machine's load must not fail a test


def check(line: bytes, number: int) -> Record | None:
    try:
        return parse_line(line, number)
    except RecordError as error:
        fault = error
    assert fault.line == number
    assert fault.message
    fault.message.encode()  # it can be stored and sent
    assert "\0" not in fault.message
    assert len(fault.message) < 1000
    return None


@untimed
@given(st.binary(max_size=200), st.integers(1, 2))
def test_random_bytes_never_surprise(line: bytes, number: int) -> None:
    check(line, number)


@untimed
@given(JSON, st.integers(1, 2))
def test_random_json_never_surprises(value: object, number: int) -> None:
    check(json.dumps(value).encode(), number)


@untimed
@given(st.lists(JSON, max_size=4), JSON)
def test_random_conversations_never_surprise(messages: list[object], tools: object) -> None:
    record = check(json.dumps({"messages": messages, "tools": tools}).encode(), 2)
    if record is not None:
        assert kind_of(record) == "chat"
        assert type(record).model_validate_json(record.model_dump_json()) == record


@untimed
@given(st.binary(max_size=400))
def test_any_file_gives_a_report(data: bytes) -> None:
    report = validate(io.BytesIO(data))
    assert Report.model_validate_json(report.model_dump_json()) == report
    assert report.num_records + report.num_faults == len(list(iter_records(io.BytesIO(data))))
