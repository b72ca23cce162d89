"""Whatever stops a run, it continues from its last checkpoint and ends with the losses of an undisturbed one."""

from __future__ import annotations

import pytest
import ray
from openai import BadRequestError, OpenAI
from ray.util import placement_group, remove_placement_group
from ray.util.state import list_actors

from service.up import Running
from tests.cluster.conftest import await_job, await_value
from tests.cluster.curves import NUM_STEPS, create_job, last_step, losses
from tests.cluster.processes import kill


@pytest.fixture(scope="module")
def undisturbed(client: OpenAI) -> dict[int, float]:
    """The losses of a run that nobody stopped."""
    job_id = create_job(client)
    await_job(client, job_id)
    curve = losses(client, job_id)
    assert sorted(curve) == list(range(1, NUM_STEPS + 1))
    return curve


def await_steps(client: OpenAI, job_id: str, num: int) -> None:
    await_value(lambda: last_step(client, job_id) >= num, f"{num} steps of {job_id}")


def room_without_runs(dashboard_url: str) -> float | None:
    """CPUs that no actor was given; None while a run's driver or workers live.

    Not `ray.available_resources()`, which learns of what becomes free some time later.
    """
    actors = list_actors(dashboard_url, filters=[("state", "=", "ALIVE")], detail=True, limit=1000)
    if any(actor.class_name.startswith(("RunDriver", "TrainWorker", "RayTrainWorker")) for actor in actors):
        return None
    return ray.cluster_resources()["CPU"] - sum((actor.required_resources or {}).get("CPU", 0.0) for actor in actors)


def test_pause_and_resume_give_the_same_losses(client: OpenAI, undisturbed: dict[int, float]) -> None:
    job_id = create_job(client)
    await_steps(client, job_id, 2)
    assert client.fine_tuning.jobs.pause(job_id).status in ("pausing", "paused")
    await_job(client, job_id, "paused")
    assert client.fine_tuning.jobs.resume(job_id).status == "queued"
    await_job(client, job_id)
    assert losses(client, job_id) == undisturbed


def test_a_killed_train_worker_costs_no_step(client: OpenAI, undisturbed: dict[int, float]) -> None:
    job_id = create_job(client)
    await_steps(client, job_id, 6)
    assert kill("ray::TrainWorker") + kill("ray::RayTrainWorker")
    await_job(client, job_id)
    assert losses(client, job_id) == undisturbed


def test_a_killed_run_driver_costs_no_step(client: OpenAI, undisturbed: dict[int, float]) -> None:
    job_id = create_job(client)
    await_steps(client, job_id, 6)
    assert kill("ray::RunDriver")
    await_job(client, job_id)
    assert losses(client, job_id) == undisturbed


def test_a_range_of_workers_runs_with_what_has_room_and_gives_the_losses_of_all(
    client: OpenAI, service: Running
) -> None:
    room = await_value(lambda: room_without_runs(service.dashboard_url), "the end of earlier runs")
    others = placement_group([{"CPU": room - 0.6}])  # leaves one worker's 0.4, also if an engine or two more come
    ray.get(others.ready())
    one = create_job(client, num_workers={"min": 1, "max": 2})
    await_job(client, one)
    remove_placement_group(others)
    events = client.fine_tuning.jobs.list_events(one, limit=100).data
    assert "Runs with 1 of up to 2 workers: the cluster has no room for more." in [event.message for event in events]
    two = create_job(client, num_workers=2)
    await_job(client, two)
    assert losses(client, two) == pytest.approx(losses(client, one), rel=1e-4)


def test_cancelling_a_running_job_stops_its_workers(client: OpenAI) -> None:
    job_id = create_job(client)
    await_steps(client, job_id, 1)
    client.fine_tuning.jobs.cancel(job_id)
    job = await_job(client, job_id)
    assert job.status == "cancelled" and job.fine_tuned_model is None
    with pytest.raises(BadRequestError):
        client.fine_tuning.jobs.cancel(job_id)
