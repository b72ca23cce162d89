"""Trackers beside a real run driver: they have the job's curve, each step once, also when the driver was killed."""

from __future__ import annotations

from typing import Any

import pytest
from openai import OpenAI

from tests.cluster.conftest import await_job, await_value
from tests.cluster.curves import create_job, last_step, losses
from tests.cluster.processes import cluster_pids, kill
from tests.jobs.test_trackers import scalars
from tests.jobs.wandb_server import offline_history


@pytest.mark.long
def test_trackers_have_the_curve_of_a_job_whose_driver_was_killed(service: Any, client: OpenAI) -> None:
    pytest.importorskip("tensorboard")
    pytest.importorskip("wandb")
    job_id = create_job(client, integrations=[{"type": "wandb", "wandb": {"project": "faq"}}])
    await_value(lambda: last_step(client, job_id) >= 6, "6 steps")
    assert kill("ray::RunDriver")
    await_job(client, job_id)
    await_value(lambda: not cluster_pids("ray::RunDriver"), "the driver's end")
    curve = losses(client, job_id)
    sent = offline_history(service.settings.home_dir / "wandb" / job_id)
    assert {row["_step"]: row["train_loss"] for row in sent} == curve
    assert dict(scalars(service.settings.tensorboard_dir, job_id, "train_loss")) == curve
    events = client.fine_tuning.jobs.list_events(job_id, limit=100).data
    assert not [event.message for event in events if "could not be reached" in event.message]
