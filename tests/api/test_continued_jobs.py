"""Jobs that start from an earlier fine-tune, over HTTP, with real training and real answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

from service.jobs.states import JobState
from service.platform import Platform
from service.store import jobs, models
from service.store.instance import DEFAULT_PROJECT
from tests.api.live import TRAINABLE as BASE
from tests.api.live import training_service, wait_for
from tests.training.runs import write_preferences, write_rows
from training.storage import Storage

LN_2 = 0.693147
TOO_MANY = {"num_workers": 2}  # more than there are: the job stays in the queue


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Platform, OpenAI]]:
    """A service with a real engine, an orchestrator that ticks, runs that really train, and a tiny base."""
    with training_service(tmp_path_factory.mktemp("home")) as made:
        yield made


@pytest.fixture(scope="module")
def client(service: tuple[Platform, OpenAI]) -> OpenAI:
    return service[1]


@pytest.fixture(scope="module")
def platform(service: tuple[Platform, OpenAI]) -> Platform:
    return service[0]


@pytest.fixture(scope="module")
def files(client: OpenAI, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Ids of uploaded files of 12 rows."""
    made = Storage(str(tmp_path_factory.mktemp("files")))
    keys = {
        "train": write_rows(made, "train"),
        "valid": write_rows(made, "valid", first=20),
        "pairs": write_preferences(made, "pairs"),
    }
    return {
        name: client.files.create(file=(name, made.read_bytes(key)), purpose="fine-tune").id
        for name, key in keys.items()
    }


def train(client: OpenAI, model: str, training_file: str, *, method: str = "supervised", **body: Any) -> FineTuningJob:
    """A finished job of a few steps, with all rows in one batch."""
    hyper = {"n_epochs": 3, "batch_size": 12, "learning_rate": 0.01, **body.pop("hyper", {})}
    settings: Any = {"type": method, method: {"hyperparameters": hyper}}
    made = client.fine_tuning.jobs.create(
        model=model, training_file=training_file, method=settings, seed=1, extra_body={"precision": "fp32", **body}
    )
    wait_for(lambda: client.fine_tuning.jobs.retrieve(made.id).finished_at is not None)
    job = client.fine_tuning.jobs.retrieve(made.id)
    assert job.status == "succeeded", job.error
    return job


def curve(client: OpenAI, job: FineTuningJob, name: str) -> list[float]:
    """A number of each step or evaluation."""
    events = [event.data for event in client.fine_tuning.jobs.list_events(job.id, limit=100) if event.type == "metrics"]
    rows: list[Any] = [data for data in reversed(events) if isinstance(data, dict) and name in data]
    return [row[name] for row in rows if ("valid_loss" in row) == name.startswith("valid")]


@pytest.fixture(scope="module")
def parent(client: OpenAI, files: dict[str, str]) -> FineTuningJob:
    """A finished adapter of the base, in every variant of LoRA at once."""
    adapter = {"rank": 4, "alpha": 8.0, "rslora": True, "dora": True, "targets": ["q_proj", "v_proj"]}
    return train(client, BASE, files["train"], validation_file=files["valid"], adapter=adapter, eval_interval=1)


@pytest.fixture(scope="module")
def full_parent(client: OpenAI, files: dict[str, str]) -> FineTuningJob:
    return train(client, BASE, files["train"], validation_file=files["valid"], adapter={"type": "none"})


def model_of(job: FineTuningJob) -> str:
    assert job.fine_tuned_model is not None
    return job.fine_tuned_model


@pytest.mark.parametrize("kind", ["parent", "full_parent"])
def test_the_first_loss_is_the_last_one_of_the_parent(
    client: OpenAI, files: dict[str, str], kind: str, request: pytest.FixtureRequest
) -> None:
    parent: FineTuningJob = request.getfixturevalue(kind)
    child = train(client, model_of(parent), files["valid"])
    assert curve(client, child, "train_loss")[0] == pytest.approx(min(curve(client, parent, "valid_loss")), rel=1e-5)
    assert child.model == model_of(parent)
    assert (child.model_extra or {})["adapter"] == (parent.model_extra or {})["adapter"]
    model: Any = client.models.retrieve(model_of(child))
    assert (model.parent, model.kind) == (model_of(parent), "adapter" if kind == "parent" else "full")


def test_the_reference_of_dpo_is_the_model_that_it_starts_from(
    client: OpenAI, files: dict[str, str], parent: FineTuningJob
) -> None:
    child = train(
        client, model_of(parent), files["pairs"], method="dpo", hyper={"beta": 0.5}, validation_file=files["pairs"]
    )
    losses = curve(client, child, "train_loss")
    assert losses[0] == pytest.approx(LN_2, abs=1e-5)
    assert losses[-1] < losses[0]
    header, *rows = client.files.content(child.result_files[0]).text.splitlines()
    assert header.startswith("step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,")
    columns = [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]
    assert float(columns[0]["train_reward_chosen"]) == pytest.approx(0, abs=1e-5)
    assert float(columns[-1]["valid_reward_margin"]) > 0
    assert float(columns[-1]["valid_reward_margin"]) == curve(client, child, "valid_reward_margin")[-1]
    (checkpoint, *_) = client.fine_tuning.jobs.checkpoints.list(child.id).data
    assert not [name for name in checkpoint.metrics.to_dict() if "reward" in name], "there OpenAI's fields stand alone"


def test_a_checkpoint_and_an_alias_are_starts_too(client: OpenAI, files: dict[str, str], parent: FineTuningJob) -> None:
    checkpoint = client.fine_tuning.jobs.checkpoints.list(parent.id).data[-1]
    assert checkpoint.metrics.valid_loss is not None
    child = train(client, checkpoint.fine_tuned_model_checkpoint, files["valid"])
    assert curve(client, child, "train_loss")[0] == pytest.approx(checkpoint.metrics.valid_loss, rel=1e-5)
    client.put("/aliases/helper", body={"model": model_of(parent)}, cast_to=dict[str, Any])
    waiting = client.fine_tuning.jobs.create(model="helper", training_file=files["train"], extra_body=TOO_MANY)
    assert waiting.model == model_of(parent), "an alias may move, the lineage does not"
    client.fine_tuning.jobs.cancel(waiting.id)


def test_parent_and_child_answer_side_by_side(client: OpenAI, files: dict[str, str], parent: FineTuningJob) -> None:
    child = train(client, model_of(parent), files["train"], hyper={"n_epochs": 30, "learning_rate": 0.03})
    asked: Any = [{"role": "user", "content": "what is 4?"}]
    answers = [
        client.chat.completions.create(model=name, messages=asked, temperature=0, max_tokens=10)
        .choices[0]
        .message.content
        for name in (BASE, model_of(parent), model_of(child))
    ]
    assert answers[2] not in answers[:2], "the further steps are in what is served"


@pytest.mark.parametrize(
    ("kind", "adapter", "param"),
    [
        ("parent", {"rank": 8}, "adapter.rank"),
        ("parent", {"alpha": 16.0}, "adapter.alpha"),
        ("parent", {"rank": "auto", "dora": False}, "adapter.dora"),
        ("parent", {"targets": ["q_proj"]}, "adapter.targets"),
        ("parent", {"type": "none"}, "adapter.type"),
        ("full_parent", {"rank": 4}, "adapter.type"),
    ],
)
def test_settings_that_would_not_fit_the_start_are_refused(
    client: OpenAI,
    files: dict[str, str],
    kind: str,
    adapter: dict[str, Any],
    param: str,
    request: pytest.FixtureRequest,
) -> None:
    name = model_of(request.getfixturevalue(kind))
    with pytest.raises(openai.BadRequestError) as caught:
        client.fine_tuning.jobs.create(model=name, training_file=files["train"], extra_body={"adapter": adapter})
    assert caught.value.param == param


def test_the_same_settings_and_another_dropout_are_accepted(
    client: OpenAI, files: dict[str, str], parent: FineTuningJob
) -> None:
    adapter = {"rank": 4, "alpha": "auto", "targets": ["v_proj", "q_proj"], "dropout": 0.1}
    body = {"adapter": adapter, **TOO_MANY}
    job = client.fine_tuning.jobs.create(model=model_of(parent), training_file=files["train"], extra_body=body)
    shown = (job.model_extra or {})["adapter"]
    assert shown == {**(parent.model_extra or {})["adapter"], "dropout": 0.1}
    client.fine_tuning.jobs.cancel(job.id)


def test_a_start_is_kept_for_its_open_jobs_and_must_be_whole(
    client: OpenAI, platform: Platform, files: dict[str, str], parent: FineTuningJob
) -> None:
    start = model_of(train(client, model_of(parent), files["valid"]))
    job = client.fine_tuning.jobs.create(model=start, training_file=files["train"], extra_body=TOO_MANY)
    with pytest.raises(openai.BadRequestError, match=job.id):
        client.models.delete(start)
    client.fine_tuning.jobs.cancel(job.id)

    with platform.db.read() as tx:
        key = models.get(tx, DEFAULT_PROJECT, start).storage_key
    manifest = json.loads(platform.storage.read_bytes(f"{key}/manifest.json"))
    platform.storage.write_bytes(f"{key}/manifest.json", json.dumps({**manifest, "step": 99}).encode())
    made = client.fine_tuning.jobs.create(model=start, training_file=files["train"])
    wait_for(lambda: client.fine_tuning.jobs.retrieve(made.id).status == "failed")
    error = client.fine_tuning.jobs.retrieve(made.id).error
    assert error is not None
    assert (error.code, error.param) == ("start_model_missing", "model")
    assert client.fine_tuning.jobs.retrieve(made.id).to_dict()["started_at"] is None, "it was never queued"

    assert client.models.delete(start).deleted
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.create(model=start, training_file=files["train"])


def test_a_checkpoint_of_a_running_job_is_no_start(
    client: OpenAI, platform: Platform, files: dict[str, str], parent: FineTuningJob
) -> None:
    waiting = client.fine_tuning.jobs.create(model=BASE, training_file=files["train"], extra_body=TOO_MANY)
    with platform.db.write() as tx:
        row = models.get(tx, DEFAULT_PROJECT, model_of(parent))
        fields = {
            name: getattr(row, name) for name in ("created_by", "base_id", "base_content_hash", "parent_id", "spec")
        }
        fields |= {
            name: getattr(row, name) for name in ("capabilities", "manifest_hash", "fingerprint", "step", "kind")
        }
        fields |= {"project_id": DEFAULT_PROJECT, "storage_key": "runs/none", "is_checkpoint": True}
        models.create(tx, id="ft:tiny:ckpt-step-1", job_id=waiting.id, **fields)
        assert jobs.by_id(tx, waiting.id).state != JobState.SUCCEEDED
    with pytest.raises(openai.BadRequestError, match=waiting.id) as caught:
        client.fine_tuning.jobs.create(model="ft:tiny:ckpt-step-1", training_file=files["train"])
    assert caught.value.param == "model"
    client.fine_tuning.jobs.cancel(waiting.id)
