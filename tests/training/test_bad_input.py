"""What cannot work is refused while it is planned, by a code, the field to change, and the line where there is one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import BASE_KEY, CHAT_TEMPLATE, GPT_NEO, make_base, make_dpo_spec, make_spec
from training.plan import PlanError, plan
from training.spec import LoraSpec, TrainSpec
from training.storage import Storage

QUESTION = {"role": "user", "content": "what is 1?"}
CHAT = {"messages": [QUESTION, {"role": "assistant", "content": "a number"}]}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def refused(storage: Storage, spec: TrainSpec) -> PlanError:
    with pytest.raises(PlanError) as caught:
        plan(spec, storage)
    assert caught.value.message.endswith(".") or "line" in caught.value.message
    return caught.value


def spec_over(storage: Storage, rows: list[Any], **fields: Any) -> TrainSpec:
    storage.write_bytes("files/rows", b"\n".join(json.dumps(row).encode() for row in rows))
    return make_spec(storage, make_base(storage), training_key="files/rows", **fields)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (CHAT_TEMPLATE.replace("message in messages", "message in messages if message.role == 'user'"), "assistant"),
        (
            CHAT_TEMPLATE.replace(
                "{{ message['content'] }}", "{{ 'x' if message.role == 'assistant' else message.content }}"
            ),
            "assistant",
        ),
    ],
    ids=["turn", "content"],
)
def test_a_template_that_drops_the_assistants_turn(storage: Storage, template: str, words: str) -> None:
    spec = spec_over(storage, [CHAT] * 10)
    (storage.local_folder(BASE_KEY) / "chat_template.jinja").write_text(template)
    error = refused(storage, spec)
    assert (error.code, error.param) == ("invalid_training_file", "training_file")
    assert "line 1: " in error.message
    assert words in error.message


def test_more_tokens_than_the_context(storage: Storage) -> None:
    long = {"messages": [QUESTION, {"role": "assistant", "content": "x" * 128}]}
    error = refused(storage, spec_over(storage, [*[CHAT] * 10, long]))
    assert (error.code, error.param) == ("invalid_training_file", "training_file")
    assert "line 11: " in error.message
    assert "at most 128 are allowed" in error.message


def test_a_validation_row_longer_than_the_context(storage: Storage) -> None:
    long = {"messages": [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y"}]}
    storage.write_bytes("files/valid", json.dumps(long).encode())
    error = refused(storage, spec_over(storage, [CHAT] * 10, validation_key="files/valid"))
    assert (error.code, error.param) == ("invalid_validation_file", "validation_file")
    assert "line 1: " in error.message


@pytest.mark.parametrize(
    ("make", "param"),
    [
        (lambda s, b: make_spec(s, b, adapter=LoraSpec(rank=33, alpha=1.0)), "adapter.rank"),
        (lambda s, b: make_spec(s, b, adapter=LoraSpec(rank=4, alpha=1.0, targets=("c_attn",))), "adapter.targets"),
        (lambda s, b: make_spec(s, b, max_length=129), "method.supervised.hyperparameters.max_length"),
    ],
    ids=["rank-above-width", "unknown-target", "max-length-above-context"],
)
def test_settings_that_the_base_cannot_take(
    storage: Storage, make: Callable[[Storage, Any], TrainSpec], param: str
) -> None:
    error = refused(storage, make(storage, make_base(storage)))
    assert (error.code, error.param) == ("invalid_value", param)


def test_a_preference_of_two_equal_sides(storage: Storage) -> None:
    spec = make_dpo_spec(storage, make_base(storage))
    rows = storage.read_bytes(spec.training_key).splitlines()
    row = json.loads(rows[4])
    rows[4] = json.dumps({**row, "non_preferred_output": row["preferred_output"]}).encode()
    storage.write_bytes(spec.training_key, b"\n".join(rows))
    error = refused(storage, spec)
    assert (error.code, error.param) == ("invalid_training_file", "training_file")
    assert "line 5: non_preferred_output: the same as preferred_output" in error.message


def test_rows_of_another_method(storage: Storage) -> None:
    error = refused(storage, make_dpo_spec(storage, make_base(storage), training_key=spec_rows(storage)))
    assert (error.code, error.param) == ("invalid_training_file", "training_file")
    assert "the method dpo learns from preference records" in error.message


def spec_rows(storage: Storage) -> str:
    storage.write_bytes("files/chats", b"\n".join([json.dumps(CHAT).encode()] * 10))
    return "files/chats"


def test_a_base_whose_architecture_nobody_knows(storage: Storage) -> None:
    spec = make_spec(storage, make_base(storage, GPT_NEO))
    config = storage.local_folder(BASE_KEY) / "config.json"
    config.write_text(config.read_text().replace("GPTNeoForCausalLM", "OracleForCausalLM"))
    error = refused(storage, spec)
    assert (error.code, error.param) == ("invalid_base_model", "model")
    assert "OracleForCausalLM" in error.message


def test_a_base_without_a_template_for_chats(storage: Storage) -> None:
    spec = spec_over(storage, [CHAT] * 10)
    (storage.local_folder(BASE_KEY) / "chat_template.jinja").unlink()
    error = refused(storage, spec)
    assert (error.code, error.param) == ("invalid_training_file", "training_file")
    assert "no chat template" in error.message
