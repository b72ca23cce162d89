"""Whatever stops a run, it continues from its last checkpoint and ends with the losses of an undisturbed one."""

from __future__ import annotations

import pytest
from openai import BadRequestError, OpenAI

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


def test_two_workers_give_the_losses_of_one(client: OpenAI) -> None:
    one = create_job(client, adapter={"type": "lora", "rank": 4})  # dropout draws differ per worker, so none here
    two = create_job(client, adapter={"type": "lora", "rank": 4}, num_workers=2)
    await_job(client, one)
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
