"""The loop under Ray Train, with an actor as the owner of the run."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from tests.training.runs import Recorder, make_base, make_spec
from training.artifact import verify
from training.loop import run
from training.progress import ArtifactWritten, ProgressItem, StepMetrics, Wish
from training.ray_run import fit
from training.storage import Storage

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A small cluster of its own, unless the tests share one already."""
    if ray.is_initialized():
        yield
        return
    ray.init(address="local", include_dashboard=True, num_cpus=4, namespace="tests", log_to_driver=False)
    yield
    ray.shutdown()


@ray.remote(num_cpus=0)
class Owner:
    """Takes the progress of a run."""

    def __init__(self) -> None:
        self.items: list[ProgressItem] = []

    def report(self, items: list[ProgressItem]) -> Wish:
        self.items += items
        return Wish.GO_ON

    def said(self) -> list[ProgressItem]:
        return self.items


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.usefixtures("cluster")
def test_workers_of_a_cluster_train_what_one_process_trains(tmp_path: Path, num_workers: int) -> None:
    storage = Storage(str(tmp_path / "storage"))
    base = make_base(storage)
    alone, owner = Recorder(), Owner.remote()
    run(make_spec(storage, base), storage, "runs/alone", alone, tmp_path / "scratch")
    fit(
        make_spec(storage, base, num_workers=num_workers),
        storage.url,
        "runs/many",
        owner,
        num_cpus_per_worker=1,
        num_gpus_per_worker=0,
        num_threads=1,
        pin_resources={"node:__internal_head__": 0.001},
        run_name=f"test-{uuid.uuid4().hex}",
        local_dir=str(tmp_path / "ray"),
    )
    items: list[Any] = ray.get(owner.said.remote())
    losses = [item.train_loss for item in items if isinstance(item, StepMetrics)]
    assert losses == pytest.approx([item.train_loss for item in alone.of(StepMetrics)], rel=1e-5)
    assert [item.seq for item in items] == list(range(len(items)))
    assert isinstance(items[-1], ArtifactWritten)
    verify(storage, items[-1].key, items[-1].manifest_hash)
    assert not list((tmp_path / "ray" / "scratch").rglob("*.safetensors")), "nothing is left behind"
