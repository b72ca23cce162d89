"""A run that finds too little memory tells which request to post instead."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI
from typer.testing import CliRunner

from service.cli import app
from service.jobs import correction
from service.jobs.launchers import LoopFit
from service.jobs.recorder import RunRecorder
from service.store.tables import Job
from tests.api.live import TRAINABLE, training_service, wait_for
from tests.training.runs import LLAMA
from training.spec import TrainSpec

NUM_ROWS, NUM_TOKENS, VOCABULARY = 12, 100, 60_000
PARTS_2 = {"gradient_accumulation_steps": 2}
DPO_4 = {"type": "dpo", "dpo": {"hyperparameters": {"gradient_accumulation_steps": 4}}}
LORA = {"type": "lora"}
LOGITS_BYTES = NUM_ROWS * NUM_TOKENS * VOCABULARY * 4


class Cramped(LoopFit):
    """A machine on which the logits of a whole batch do not fit, and those of a part of it do."""

    def __call__(self, spec: TrainSpec, run_key: str, recorder: RunRecorder) -> None:
        """Train with less address space, as long as a batch is taken whole."""
        if spec.hyperparameters.gradient_accumulation_steps != 1:
            super().__call__(spec, run_key, recorder)
            return
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + LOGITS_BYTES * 3 // 4, before[1]))
        try:
            super().__call__(spec, run_key, recorder)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    if not Path("/proc/self/statm").exists():
        pytest.skip("only Linux limits the address space of a process")
    with training_service(tmp_path_factory.mktemp("home"), Cramped, {**LLAMA, "vocab_size": VOCABULARY}) as (_, made):
        yield made


def test_the_suggested_request_is_accepted_as_it_is_and_trains(client: OpenAI) -> None:
    rows = (json.dumps({"text": "x" * (NUM_TOKENS + i)}) for i in range(NUM_ROWS))
    file = client.files.create(file=("rows.jsonl", "\n".join(rows).encode()), purpose="fine-tune")
    hyper = {"n_epochs": 1, "batch_size": NUM_ROWS, "gradient_accumulation_steps": 1}
    made = client.fine_tuning.jobs.create(
        model=TRAINABLE,
        training_file=file.id,
        suffix="big",
        method={"type": "supervised", "supervised": {"hyperparameters": hyper}},  # type: ignore[typeddict-item]
        extra_body={"precision": "fp32", "adapter": {"rank": 2}},
    )
    wait_for(lambda: client.fine_tuning.jobs.retrieve(made.id).finished_at is not None)
    failed = client.fine_tuning.jobs.retrieve(made.id)
    assert failed.status == "failed"
    assert failed.error is not None
    assert failed.error.code == "out_of_memory"
    assert "gradient_accumulation_steps 2 instead of 1" in failed.error.message
    body = (failed.error.model_extra or {})["suggested_request"]
    assert body == {
        "model": TRAINABLE,
        "training_file": file.id,
        "suffix": "big",
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": {**hyper, "gradient_accumulation_steps": 2}},
        },
        "precision": "fp32",
        "adapter": {"rank": 2},
    }
    where = ("--url", str(client.base_url).rstrip("/"), "--key", client.api_key)
    assert json.dumps(body) in CliRunner().invoke(app, ["jobs", failed.id, *where]).output
    again = client.post("/fine_tuning/jobs", body=body, cast_to=dict[str, Any])
    wait_for(lambda: client.fine_tuning.jobs.retrieve(again["id"]).finished_at is not None)
    assert client.fine_tuning.jobs.retrieve(again["id"]).status == "succeeded"


def job(request: dict[str, Any], *, method: str = "supervised", **changes: Any) -> Job:
    """A planned job of 8 examples a step on 2 workers."""
    hyper = {"n_epochs": 1, "batch_size": 8, "learning_rate_multiplier": 1.0, "learning_rate": 1.0, "max_length": 9}
    spec: dict[str, Any] = {
        "base": {"id": "b", "key": "b", "content_hash": "c"},
        "training_key": "t",
        "adapter": {"rank": 1, "alpha": 1.0},
        "hyperparameters": {**hyper, "gradient_accumulation_steps": changes.pop("parts", 4)},
        "precision": "bf16",
        "num_workers": 2,
        "eval_interval": 1,
        "checkpoint_interval": 1,
        **changes,
    }
    if method == "dpo":
        spec |= {"method": "dpo", "dpo": {"beta": 0.1, "gamma": 0.0}}
    if method == "embedding":
        spec |= {"method": "embedding", "embedding": {"temperature": 0.05}}
    return Job(method=method, request=request, spec=spec)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (job({"model": "b"}, parts=1), {"method": {"type": "supervised", "supervised": {"hyperparameters": PARTS_2}}}),
        (job({"model": "b", "method": {"type": "dpo", "dpo": None}}, method="dpo", parts=3), {"method": DPO_4}),
        (job({"model": "b", "_made_by_retry": True, "adapter": {"type": "none"}}, adapter=None), {"adapter": LORA}),
        (job({"model": "b", "precision": "fp32"}, precision="fp32"), {"precision": "bf16"}),
        (job({"model": "b"}), None),
        (job({"model": "b"}, method="embedding", parts=2), None),
        (job({"model": "b"}, adapter=None, start={"model_id": "m", "key": "k", "manifest_hash": "h"}), None),
    ],
    ids=[
        "split",
        "split-no-further-than-single-examples",
        "lora",
        "bf16",
        "nothing-left",
        "pools-keep-two",
        "full-weights-stay-full",
    ],
)
def test_what_changes_least_comes_first(made: Job, expected: dict[str, Any] | None) -> None:
    sent = json.dumps(made.request)
    found = correction.for_less_memory(made)
    assert (found and found.request) == (expected and {"model": "b", **expected})
    assert json.dumps(made.request) == sent
