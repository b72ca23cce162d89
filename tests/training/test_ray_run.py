"""The loop under Ray Train, with an actor as the owner of the run."""

from __future__ import annotations

import time
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
from training.ray_run import NoRoom, fit
from training.spec import TrainSpec
from training.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.long]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A small cluster of its own; tests that share the session's come later."""
    ray.init(address="local", include_dashboard=True, num_cpus=4, namespace="tests", log_to_driver=False)
    yield
    ray.shutdown()


class Owner:
    """Calls `fit` in a thread, as a run driver does, and takes the progress of its run."""

    def __init__(self) -> None:
        self.items: list[ProgressItem] = []

    def report(self, items: list[ProgressItem]) -> Wish:
        self.items += items
        return Wish.GO_ON

    def said(self) -> list[ProgressItem]:
        return self.items

    def run(self, spec: TrainSpec, storage_url: str, local_dir: str) -> None:
        """Train on the cluster, to the end."""
        fit(
            spec,
            storage_url,
            "runs/many",
            ray.get_runtime_context().current_actor,
            num_workers=spec.num_workers,
            num_cpus_per_worker=1,
            num_gpus_per_worker=0,
            num_threads=1,
            pin_resources={"node:__internal_head__": 0.001},
            run_name=f"test-{uuid.uuid4().hex}",
            local_dir=local_dir,
        )


def new_owner(kind: type[Owner] = Owner, **env: str) -> Any:
    options = {"num_cpus": 0, "max_concurrency": 4, "lifetime": "detached", "name": uuid.uuid4().hex}
    return ray.remote(kind).options(**options, runtime_env={"env_vars": env}).remote()


def await_free(num_cpus: float) -> None:
    """Wait until the cluster has CPUs free."""
    while ray.available_resources().get("CPU", 0) < num_cpus:
        time.sleep(0.1)


@pytest.mark.usefixtures("cluster")
def test_one_worker_trains_what_one_process_trains(tmp_path: Path) -> None:
    check_run(tmp_path, num_workers=1)


@pytest.mark.usefixtures("cluster")
def test_two_workers_train_the_same_and_a_killed_owner_takes_its_workers_along(tmp_path: Path) -> None:
    free = ray.available_resources()["CPU"]
    check_run(tmp_path / "whole", num_workers=2)
    await_free(free)
    storage, owner = Storage(str(tmp_path / "killed")), new_owner()
    endless = make_spec(storage, make_base(storage), num_workers=2, n_epochs=50, batch_size=2)
    owner.run.remote(endless, storage.url, str(tmp_path / "ray"))
    while not any(isinstance(item, StepMetrics) for item in ray.get(owner.said.remote())):
        time.sleep(0.1)
    ray.kill(owner)
    await_free(free)


@pytest.mark.usefixtures("cluster")
def test_two_workers_that_share_all_weights_train_the_same(tmp_path: Path) -> None:
    check_run(tmp_path, num_workers=2, lora=False, parallel="fsdp")


class Crowded(Owner):
    """An owner whose workers find no room."""

    def run(self, spec: TrainSpec, storage_url: str, local_dir: str) -> None:
        """Return when that is told as such."""
        with pytest.raises(NoRoom):
            super().run(spec, storage_url, local_dir)


@pytest.mark.usefixtures("cluster")
def test_workers_of_a_range_that_find_no_room_in_time_give_up_their_place(tmp_path: Path) -> None:
    """So that fewer may be tried; a fixed number waits."""
    storage, owner = Storage(str(tmp_path / "storage")), new_owner(Crowded, RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="3")
    spec = make_spec(storage, make_base(storage), num_workers=9, min_workers=1)
    ray.get(owner.run.remote(spec, storage.url, str(tmp_path / "ray")))
    assert ray.get(owner.said.remote()) == []
    assert {group["state"] for group in ray.util.placement_group_table().values()} == {"REMOVED"}
    ray.kill(owner)


def check_run(folder: Path, num_workers: int, lora: bool = True, **spread: Any) -> None:
    """A run on the cluster against one in this process."""
    storage = Storage(str(folder / "storage"))
    base = make_base(storage)
    alone, owner = Recorder(), new_owner()
    run(make_spec(storage, base, lora), storage, "runs/alone", alone, folder / "scratch")
    spec = make_spec(storage, base, lora, num_workers=num_workers, **spread)
    ray.get(owner.run.remote(spec, storage.url, str(folder / "ray")))
    items: list[Any] = ray.get(owner.said.remote())
    losses = [item.train_loss for item in items if isinstance(item, StepMetrics)]
    assert losses == pytest.approx([item.train_loss for item in alone.of(StepMetrics)], rel=1e-5)
    assert [item.seq for item in items] == list(range(len(items)))
    assert isinstance(items[-1], ArtifactWritten)
    verify(storage, items[-1].key, items[-1].manifest_hash)
    assert not list((folder / "ray" / "scratch").rglob("*.safetensors")), "nothing is left behind"
    ray.kill(owner)
