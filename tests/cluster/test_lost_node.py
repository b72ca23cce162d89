"""A machine of the cluster that dies takes its workers along; the job goes on from its checkpoint on what is left."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import psutil
import pytest
from openai import OpenAI, OpenAIError
from ray.cluster_utils import Cluster

from tests.cluster.conftest import add_base, await_job, await_value, cluster_settings
from tests.cluster.curves import create_job, last_step, losses
from tests.database import empty_postgres
from tests.shared import MODELS

pytestmark = pytest.mark.long

CHECKPOINT_INTERVAL = 5
HYPER = {"n_epochs": 20, "batch_size": 8, "learning_rate": 0.005}  # 100 steps: the node dies long before the last
FIELDS = {
    "method": {"type": "supervised", "supervised": {"hyperparameters": HYPER}},
    "num_workers": {"min": 1, "max": 2},
    "checkpoint_interval": CHECKPOINT_INTERVAL,
}


def kill_machine(raylet_pid: int) -> None:
    """`kill -9` a node's raylet and all that it has started, as a power cut would."""
    raylet = psutil.Process(raylet_pid)
    for process in [raylet, *raylet.children(recursive=True)]:
        os.kill(process.pid, signal.SIGKILL)


def answers(client: OpenAI) -> bool:
    """Whether the base is served, which takes a moment after it is ready."""
    try:
        return bool(client.completions.create(model="stories", prompt="Once", max_tokens=1).choices)
    except OpenAIError:
        return False


def test_a_node_that_dies_costs_a_job_the_steps_since_its_last_checkpoint(cluster: Cluster, tmp_path: Path) -> None:
    """Two workers, for only one of which the head has room; state lies where every node could reach it."""
    from service.up import running_service

    with empty_postgres() as database_url:
        settings = cluster_settings(
            tmp_path / "home",
            ray_address=cluster.address,
            database_url=database_url,
            storage_url=f"file://{tmp_path}/storage",
            train_num_cpus=1.0,
        )
        with running_service(settings) as running, OpenAI(base_url=running.url, api_key=running.admin_key) as client:
            add_base(client, "stories", str(MODELS / "stories260K"))
            await_value(lambda: answers(client), "an engine, which lives on the head from now on")
            node = cluster.add_node(num_cpus=1)
            job_id = create_job(client, **FIELDS)
            await_value(lambda: last_step(client, job_id) > 2 * CHECKPOINT_INTERVAL, f"steps of {job_id}")
            seen = last_step(client, job_id)
            kill_machine(node.all_processes["raylet"][0].process.pid)
            job = await_job(client, job_id, timeout_s=400)  # Ray sees after 15 s that a node is gone
            assert job.status == "succeeded", job.error

            told = " ".join(event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100))
            resumed = re.search(r"continuing from step (\d+)", told)
            assert resumed is not None, told
            assert int(resumed[1]) >= seen - CHECKPOINT_INTERVAL
            assert "Runs with 1 of up to 2 workers" in told
            whole = create_job(client, **FIELDS)
            await_job(client, whole)
            assert losses(client, job_id) == pytest.approx(losses(client, whole), rel=1e-3)
