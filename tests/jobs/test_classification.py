"""A classifier's whole life: an encoder is imported, a job trains it, and a model with a report is published."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from service.jobs.launchers import LoopFit
from service.jobs.states import JobState
from service.serving.fleet import wanted
from service.store import files, models
from service.store.tables import BaseModel, Job, Model
from tests.jobs.encoding import encode, import_encoder
from tests.jobs.world import PROJECT, World
from tests.training.labelled import LABELS, labelled_rows, write_encoder
from training.artifact import verify
from training.spec import BaseRef, ClassificationSpec, Hyperparameters, LoraSpec, TrainSpec
from training.storage import Storage


@pytest.fixture
def world(build: Callable[..., World], tmp_path: Path) -> World:
    """A platform that really trains."""
    return build(make_fit=lambda storage: LoopFit(storage, tmp_path / "scratch"))


@pytest.fixture
def base(world: World, tmp_path: Path) -> BaseModel:
    """A tiny encoder."""
    return import_encoder(world, write_encoder(tmp_path / "encoder"))


def create(world: World, base: BaseModel, rows: list[dict[str, str]], **changes: Any) -> Job:
    ref = BaseRef(id=base.id, key=base.storage_key or "", content_hash=base.content_hash or "")
    fields: dict[str, Any] = {
        "method": "classification",
        "classification": ClassificationSpec(),
        "adapter": None,
        "hyperparameters": Hyperparameters(n_epochs=3, batch_size=8, learning_rate=3e-3),
    }
    spec = TrainSpec(base=ref, training_key="-", **(fields | changes))
    return world.create(world.upload(rows), spec, method=spec.method)


@pytest.mark.parametrize("adapter", [None, LoraSpec()], ids=["full", "lora"])
def test_a_job_becomes_a_model_that_classifies_with_its_report(
    world: World, base: BaseModel, adapter: LoraSpec | None
) -> None:
    job = create(world, base, labelled_rows(40), validation_split=0.25, adapter=adapter)
    job = world.tick_to(job, JobState.SUCCEEDED)
    with world.db.read() as tx:
        model = models.get(tx, PROJECT, job.fine_tuned_model or "")
        made = [files.get(tx, PROJECT, file_id) for file_id in job.result_file_ids]
        apps = wanted(tx, world.settings, "one")
    assert (model.kind, model.capabilities) == ("full" if adapter is None else "adapter", ["classify"])
    hosted = [(app.deployable.kind, app.deployable.id, app.deployable.task) for app in apps]
    assert hosted[0] == ("base", "encoder", "embed")
    assert ("full", model.id, "classify") in hosted, "an adapter too has an app of its own"
    manifest = verify(world.storage, model.storage_key, model.manifest_hash)
    assert manifest.spec is not None
    assert (manifest.kind, manifest.spec.method) == (model.kind, "classification")
    config = json.loads(world.storage.read_bytes(f"{model.storage_key}/config.json"))
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {str(number): label for number, label in enumerate(LABELS)}
    assert [file.filename for file in made] == ["step_metrics.csv", "evaluation.json"]
    report = json.loads(world.storage.read_bytes(made[1].storage_key))
    assert report == json.loads(world.storage.read_bytes(f"{model.storage_key}/evaluation.json"))
    assert report["num_examples"] == 10
    assert isinstance(report["temperature"], float)
    assert any(text.startswith("Validation: accuracy") for text in world.messages(job))
    texts = [row["text"] for row in labelled_rows(8)]
    answer = encode(world, model.id, texts)
    assert answer.labels == LABELS
    expected = plain_log_probabilities(world.storage, base, model, texts) / report["temperature"]
    np.testing.assert_allclose(answer.rows, torch.log_softmax(expected, dim=-1), atol=1e-4)


def plain_log_probabilities(storage: Storage, base: BaseModel, model: Model, texts: list[str]) -> torch.Tensor:
    """Log-probabilities as transformers and PEFT compute them from the published folder."""
    folder, weights = storage.local_folder(model.storage_key), storage.local_folder(base.storage_key or "")
    loaded: Any = AutoModelForSequenceClassification
    plain = loaded.from_pretrained(
        weights if model.kind == "adapter" else folder, config=AutoConfig.from_pretrained(folder)
    )
    if model.kind == "adapter":
        plain = PeftModel.from_pretrained(plain, str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = [plain.eval()(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    return torch.stack(logits).log_softmax(dim=-1)


def test_without_validation_there_is_no_report(world: World, base: BaseModel) -> None:
    job = world.tick_to(create(world, base, labelled_rows(12)), JobState.SUCCEEDED)
    assert len(job.result_file_ids) == 1


def test_rows_of_one_label_fail_before_the_job_is_queued(world: World, base: BaseModel) -> None:
    rows = [{"text": f"cat {i}", "label": "cat"} for i in range(12)]
    job = world.tick_to(create(world, base, rows), JobState.FAILED)
    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == ("invalid_training_file", "training_file")
    assert job.started_at is None


def test_an_encoder_that_should_write_fails_before_the_job_is_queued(world: World, base: BaseModel) -> None:
    changes = {"method": "supervised", "classification": None, "adapter": LoraSpec()}
    job = world.tick_to(create(world, base, [{"text": "a cat"}] * 12, **changes), JobState.FAILED)
    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == ("invalid_base_model", "model")
