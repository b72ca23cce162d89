"""A machine of the cluster that dies takes the workers on it along, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.training.runs import Recorder, make_base, make_spec
from tests.training.test_ray_run import new_owner
from training.checkpoints import Checkpoints
from training.loop import run
from training.progress import ArtifactWritten, CheckpointSaved, StepMetrics
from training.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.long]

EVERYWHERE: dict[str, float] = {}  # workers on any node; on one machine they are pinned to it


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head with room for one worker, and a node with room for another."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": True})
    ray.init(address=cluster.address, namespace="tests", log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_lost_node_costs_the_steps_since_the_last_checkpoint(tmp_path: Path, cluster: Cluster) -> None:
    """Two workers, one on each node; the node goes in the middle, and one worker goes on alone."""
    node = cluster.add_node(num_cpus=1)
    storage = Storage(str(tmp_path / "storage"))
    fields: dict[str, Any] = {"n_epochs": 20, "batch_size": 4, "checkpoint_interval": 4, "keep_checkpoints": 99}
    spec = make_spec(storage, make_base(storage), num_workers=2, min_workers=1, **fields)
    alone = Recorder()
    run(spec.model_copy(update={"num_workers": 1}), storage, "runs/alone", alone, tmp_path / "scratch")

    owner = new_owner()
    broken = owner.run.remote(spec, storage.url, str(tmp_path / "ray"), 2, EVERYWHERE)
    while not any(isinstance(item, CheckpointSaved) for item in ray.get(owner.said.remote())):
        time.sleep(0.05)
    cluster.remove_node(node, allow_graceful=False)
    with pytest.raises(ray.exceptions.RayError):
        ray.get(broken)
    saved = Checkpoints(storage, "runs/many", spec).committed()[-1]
    seen = [item.step for item in ray.get(owner.said.remote()) if isinstance(item, StepMetrics)]
    assert saved <= seen[-1] <= saved + 4

    num_items = len(ray.get(owner.said.remote()))
    ray.get(owner.run.remote(spec, storage.url, str(tmp_path / "ray"), 1, EVERYWHERE))
    items = ray.get(owner.said.remote())[num_items:]
    steps = [item for item in items if isinstance(item, StepMetrics)]
    assert steps[0].step == saved + 1
    expected = [item.train_loss for item in alone.of(StepMetrics)][saved:]
    assert [item.train_loss for item in steps] == pytest.approx(expected, rel=1e-4)
    assert isinstance(items[-1], ArtifactWritten)
    ray.kill(owner)
