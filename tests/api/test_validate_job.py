"""What a job would take, told before one is created: real planner, real worker task, real try-out of a real model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI

from service.api import validate_job
from service.api.views import plan_json
from service.jobs.preview import preview
from service.jobs.rehearsal import Rehearsal
from service.jobs.states import JobState
from service.platform import Platform
from service.settings import Settings
from service.store import bases, files, jobs, metrics, tasks
from service.store.instance import DEFAULT_PROJECT
from tests.api.conftest import NewClient, upload
from tests.api.live import ECHO, live_service, sync_client, ticking
from tests.training.runs import BASE_KEY, make_base
from training.estimate import START_S
from training.plan import plan
from training.spec import BaseRef, ClassificationSpec, TrainSpec

PATIENCE_S = 60
TINY = "tiny-llama"
BASE = BaseRef(id=TINY, key=BASE_KEY, content_hash="0123")
ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Platform, OpenAI]]:
    """A service with a real tiny base, and an orchestrator that ticks beside it."""
    with (
        pytest.MonkeyPatch.context() as patch,
        live_service(tmp_path_factory.mktemp("home"), validate_timeout_s=240) as (platform, url, secret),
    ):
        patch.setattr(validate_job, "POLL_S", 0.02)
        ref = make_base(platform.storage)
        with platform.db.write() as tx:
            bases.add(tx, project_id=DEFAULT_PROJECT, created_by=None, id=TINY, source="starter", revision=None)
            fields: dict[str, Any] = {"storage_key": ref.key, "content_hash": "0123", "manifest_hash": "4567"}
            fields |= {"capabilities": ["chat", "completions"], "architecture": "LlamaForCausalLM", "max_context": 128}
            bases.set_ready(tx, TINY, fingerprint={}, num_parameters=1000, **fields)
        with ticking(platform, Rehearsal(platform.storage)), sync_client(url, secret) as client:
            yield platform, client


def send(client: OpenAI, rows: list[Any]) -> str:
    """A file's id, before it is validated."""
    content = b"\n".join(json.dumps(row).encode() for row in rows)
    return client.files.create(file=("rows.jsonl", content), purpose="fine-tune").id


def validate(client: OpenAI, training_file: str, **fields: Any) -> dict[str, Any]:
    body = {"model": TINY, "training_file": training_file, **fields}
    return client.post("/fine_tuning/jobs/validate", cast_to=dict[str, Any], body=body)


def on_gpus(platform: Platform) -> Settings:
    """Of a service that trains on GPUs, where planning tries nothing out."""
    return platform.settings.model_copy(update={"train_num_gpus": 1.0})


def rows_of(platform: Platform) -> tuple[int, int]:
    """Jobs, and tasks of this kind."""
    with platform.db.read() as tx:
        return len(jobs.in_state(tx, *JobState)), tasks.num_open(tx, "preview_job")


def test_the_plan_of_a_job_that_nobody_created(service: tuple[Platform, OpenAI]) -> None:
    platform, client = service
    file_id = send(client, [ROW] * 20)  # still being checked when the request comes
    seen = validate(client, file_id, validation_split=0.2, adapter={"rank": 4}, seed=3)
    assert seen["object"] == "fine_tuning.job.plan"
    assert (seen["num_examples"], seen["num_validation_examples"]) == (16, 4)
    hyper = seen["resolved"]["method"]["supervised"]["hyperparameters"]
    assert seen["total_steps"] == hyper["n_epochs"] * -(-16 // hyper["batch_size"])
    assert seen["num_tokens"] == hyper["n_epochs"] * seen["num_tokens_per_epoch"]
    assert 0 < seen["num_trained_tokens_per_epoch"] < seen["num_tokens_per_epoch"]
    assert "auto" not in json.dumps(seen["resolved"])
    assert (seen["resolved"]["adapter"]["rank"], seen["resolved"]["seed"]) == (4, 3)
    assert 400e6 < seen["peak_memory_bytes"] < 700e6  # a process with torch in it
    assert seen["duration_s"] > 1
    assert "tried on this machine" in seen["time_basis"]
    disk = seen["disk"]
    assert disk["num_kept_checkpoints"] == 6  # the last three, each with a best of its own
    assert disk["total_bytes"] == 6 * disk["checkpoint_bytes"] + disk["artifact_bytes"] < disk["free_bytes"]
    assert seen["warnings"] == []
    assert rows_of(platform) == (0, 0)


def test_the_speed_of_an_earlier_job_counts_and_full_weights_answer_by_themselves(
    service: tuple[Platform, OpenAI],
) -> None:
    platform, client = service
    file_id = upload(client, platform, (json.dumps(ROW).encode() + b"\n") * 20)
    with platform.db.write() as tx:
        key = files.get(tx, DEFAULT_PROJECT, file_id).storage_key
    spec = TrainSpec(base=BASE, training_key=key, adapter=None)
    made = plan(spec, platform.storage)
    with platform.db.write() as tx:
        fields: dict[str, Any] = {"project_id": DEFAULT_PROJECT, "created_by": None, "priority": 0, "base_id": TINY}
        fields |= {"training_file_id": file_id, "method": "supervised", "request": {}, "request_hash": "-"}
        job = jobs.create(tx, **fields, spec=made.spec.model_dump(mode="json"))
        jobs.move(tx, job.id, JobState.QUEUED, plan={**made.model_dump(mode="json"), "num_gpus_per_worker": 0.0})
        jobs.move(tx, job.id, JobState.RUNNING)
        for step in range(1, 11):  # each step trains 50 tokens in half a second
            metrics.add(tx, job.id, 1, "step", step, {"num_trained_tokens": 50, "tokens_per_s": 100.0}, float(step))
        metrics.add(tx, job.id, 1, "step", 11, {"num_trained_tokens": 0, "tokens_per_s": 0.0}, 11.0)  # an idle step
        jobs.move(tx, job.id, JobState.SUCCEEDED)
    native = platform.settings.model_copy(update={"engine": "native"})
    seen = preview(native, platform.db, platform.storage, spec, DEFAULT_PROJECT)["plan"]
    assert job.id in seen["time_basis"]
    strange = preview(native, platform.db, platform.storage, spec, "proj-strange")["plan"]
    assert strange["time_basis"].startswith("the speed of an earlier job")
    assert job.id not in str(strange)
    assert seen["duration_s"] == pytest.approx(0.5 * made.total_steps + START_S, abs=3.0)
    assert seen["serving"]["can_be_served"]
    assert seen["serving"]["deployment"] == "its own"
    unknown = preview(on_gpus(platform), platform.db, platform.storage, spec, DEFAULT_PROJECT)["plan"]
    assert unknown["duration_s"] is None
    assert unknown["time_basis"].startswith("unknown: ")


BAD: list[tuple[list[Any], dict[str, Any], str, str, str]] = [
    ([ROW] * 9, {}, "invalid_training_file", "training_file", "at least 10"),
    ([ROW] * 10, {"adapter": {"rank": 33}}, "invalid_value", "adapter.rank", "width of 32"),
    ([ROW] * 10, {"adapter": {"targets": ["c_attn"]}}, "invalid_value", "adapter.targets", "q_proj"),
    ([*[ROW] * 10, {"messages": []}], {}, "invalid_training_file", "training_file", "line 11"),
    (
        [*[ROW] * 10, {"messages": [ROW["messages"][0], {"role": "assistant", "content": "x" * 200}]}],
        {},
        "invalid_training_file",
        "training_file",
        "line 11: .*at most 128",
    ),
    ([ROW] * 10, {"method": {"type": "dpo"}}, "invalid_training_file", "training_file", "line 1: .*preference"),
]


@pytest.mark.parametrize(("rows", "fields", "code", "param", "words"), BAD)
def test_the_error_is_the_one_that_the_job_would_end_with(
    service: tuple[Platform, OpenAI], rows: list[Any], fields: dict[str, Any], code: str, param: str, words: str
) -> None:
    platform, client = service
    file_id = send(client, rows)
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        validate(client, file_id, **fields)
    assert (caught.value.code, caught.value.param) == (code, param)
    assert rows_of(platform)[1] == 0


SWEEP = {"validation_split": 0.2, "sweep": {"search": "grid", "parameters": {"learning_rate": [1e-3, 1e-4]}}}


def test_a_body_is_checked_as_by_create(service: tuple[Platform, OpenAI]) -> None:
    _, client = service
    for fields, param in (
        ({"wat": 1}, "wat"),
        (SWEEP, "sweep"),
        ({"num_workers": 99}, "num_workers"),
        ({}, "training_file"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            validate(client, "file-none", **fields)
        assert caught.value.param == param


def test_a_range_of_workers_is_planned_for_the_most(service: tuple[Platform, OpenAI]) -> None:
    _, client = service
    file_id = send(client, [ROW] * 20)
    seen = validate(client, file_id, num_workers={"min": 1, "max": 2})
    assert seen["num_workers"] == {"min": 1, "max": 2}
    alike = validate(client, file_id, num_workers=2)
    for name in ("resolved", "peak_memory_bytes", "total_steps"):
        assert {**seen, "seed": 0}[name] == alike[name]


def test_of_a_classification_only_what_can_be_chosen_is_a_hyperparameter(service: tuple[Platform, OpenAI]) -> None:
    platform, _ = service
    rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]
    platform.storage.write_bytes("files/labelled", "\n".join(map(json.dumps, rows)).encode())
    spec = TrainSpec(
        base=BASE, training_key="files/labelled", method="classification", classification=ClassificationSpec()
    )
    made = preview(on_gpus(platform), platform.db, platform.storage, spec, DEFAULT_PROJECT)["plan"]
    seen = plan_json(made, seed=None)["resolved"]["method"]["classification"]
    assert seen["hyperparameters"].keys() >= {"class_weights", "label_smoothing", "n_epochs"}
    assert not seen["hyperparameters"].keys() & {"labels", "label_counts"}


def test_a_key_without_the_scope_may_not_plan(new_client: NewClient) -> None:
    with pytest.raises(openai.PermissionDeniedError):
        validate(new_client("inference"), "file-none")


def test_a_request_does_not_wait_for_ever_and_is_not_sent_again(tmp_path: Path) -> None:
    """Without an orchestrator nobody plans. The client would try a 504 twice more, so it is told not to."""
    with live_service(tmp_path, validate_timeout_s=0.5) as (platform, url, secret):
        client = OpenAI(base_url=url, api_key=secret, max_retries=2)
        file_id = upload(client, platform)
        with pytest.raises(openai.InternalServerError) as caught:
            validate(client, file_id, model=ECHO)
        assert (caught.value.status_code, caught.value.code) == (504, "validation_timeout")
        assert rows_of(platform) == (0, 0)
        for _ in range(4):
            with platform.db.write() as tx:
                tasks.add(tx, "preview_job", {})
        with pytest.raises(openai.RateLimitError):
            validate(client.with_options(max_retries=0), file_id, model=ECHO)
