"""An embedding model's whole life: an encoder is imported and embeds, a job trains it, and the model embeds better."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service.jobs.launchers import LoopFit
from service.jobs.states import JobState
from service.store import models
from service.store.tables import BaseModel, Job
from tests.engine.encoders import save_encoder
from tests.jobs.encoding import encode, import_encoder
from tests.jobs.world import PROJECT, World
from training.spec import BaseRef, EmbeddingSpec, Hyperparameters, LoraSpec, TrainSpec

PAIRS = [("my bill", "was charged twice"), ("the app", "crashes"), ("love it", "thanks"), ("error", "not working")]


@pytest.fixture
def world(build: Callable[..., World], tmp_path: Path) -> World:
    """A platform that really trains."""
    return build(make_fit=lambda storage: LoopFit(storage, tmp_path / "scratch"))


@pytest.fixture
def base(world: World, tmp_path: Path) -> BaseModel:
    """A tiny encoder in sentence-transformers' layout."""
    return import_encoder(world, save_encoder(tmp_path / "encoder", pooling="mean_tokens"))


def create(world: World, base: BaseModel, **changes: Any) -> Job:
    ref = BaseRef(id=base.id, key=base.storage_key or "", content_hash=base.content_hash or "")
    fields: dict[str, Any] = {
        "method": "embedding",
        "embedding": EmbeddingSpec(),
        "adapter": None,
        "hyperparameters": Hyperparameters(n_epochs=10, batch_size=8, learning_rate=3e-3),
    }
    rows = [
        {"anchor": f"{anchor} {i}", "positive": f"{positive} {i % 3}"} for i in range(4) for anchor, positive in PAIRS
    ]
    spec = TrainSpec(base=ref, training_key="-", **(fields | changes))
    return world.create(world.upload(rows), spec, method=spec.method)


def margin(world: World, model: str) -> float:
    """How much nearer the texts of a pair are than those of different pairs."""
    rows = encode(world, model, [text for pair in PAIRS for text in pair]).rows
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    near = rows[::2] @ rows[1::2].T
    others = near[~np.eye(len(PAIRS), dtype=bool)]
    return float(near.diagonal().mean() - others.mean())


@pytest.mark.parametrize("adapter", [None, LoraSpec()], ids=["full", "lora"])
def test_a_job_becomes_a_model_that_embeds_better_than_its_base(
    world: World, base: BaseModel, adapter: LoraSpec | None
) -> None:
    n_epochs, rate = (10, 3e-3) if adapter is None else (30, 5e-3)
    hyper = Hyperparameters(n_epochs=n_epochs, batch_size=8, learning_rate=rate)
    job = world.tick_to(create(world, base, adapter=adapter, hyperparameters=hyper), JobState.SUCCEEDED)
    with world.db.read() as tx:
        model = models.get(tx, PROJECT, job.fine_tuned_model or "")
    assert (model.kind, model.capabilities) == ("full" if adapter is None else "adapter", ["embed"])
    pooling = json.loads(world.storage.read_bytes(f"{model.storage_key}/1_Pooling/config.json"))
    assert pooling["pooling_mode_mean_tokens"] is True
    assert margin(world, model.id) > margin(world, "encoder") + 0.3


def test_a_damaged_adapter_is_not_served(world: World, base: BaseModel) -> None:
    job = world.tick_to(create(world, base, adapter=LoraSpec()), JobState.SUCCEEDED)
    with world.db.read() as tx:
        model = models.get(tx, PROJECT, job.fine_tuned_model or "")
    key = f"{model.storage_key}/adapter_model.safetensors"
    world.storage.write_bytes(key, world.storage.read_bytes(key)[:-1] + b"x")
    with pytest.raises(Exception, match="content differs"):
        encode(world, model.id, ["a"])
