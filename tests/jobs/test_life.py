"""The life of a job, from its files to its model, with rehearsed runs."""

from __future__ import annotations

import threading

import pytest

from service.jobs.recorder import RunRecorder
from service.jobs.rehearsal import TOKENS_PER_STEP, Rehearsal, loss
from service.jobs.states import JobState
from service.store import checkpoints, files, jobs, models
from tests.jobs.gate import Build, gated
from tests.jobs.test_faults import claim_by_hand
from tests.jobs.world import GOOD_LINES, PATIENCE_S, PROJECT, World
from training.progress import Sample


def test_a_queued_job_becomes_a_callable_model(world: World) -> None:
    job = world.tick_to(world.queue(suffix="x"), JobState.SUCCEEDED)
    assert job.fine_tuned_model is not None
    assert job.trained_tokens == 4 * TOKENS_PER_STEP
    assert job.started_at is not None
    assert job.finished_at is not None
    with world.db.read() as tx:
        model = models.get(tx, PROJECT, job.fine_tuned_model)
    assert (model.kind, model.step, model.is_checkpoint, model.capabilities) == ("adapter", 4, False, ["completions"])
    assert world.run(job).outcome == "succeeded"
    assert world.messages(job)[-2:] == [
        f"New fine-tuned model created: {model.id}",
        "The job has successfully completed",
    ]


def test_every_step_is_an_event_with_openai_data(world: World) -> None:
    job = world.tick_to(world.queue(), JobState.SUCCEEDED)
    metrics = [event for event in world.events(job) if event.type == "metrics"]
    first = next(event for event in metrics if event.message.startswith("Step 2/4: training loss="))
    assert first.data is not None
    assert first.data["train_loss"] == loss(2)
    assert {"step", "total_steps", "train_mean_token_accuracy"} <= first.data.keys()
    evaluated = next(event for event in metrics if event.message.startswith("Step 2/4: validation loss="))
    assert evaluated.data is not None
    assert {"step", "total_steps", "train_loss", "valid_loss", "full_valid_loss"} <= evaluated.data.keys()


def test_a_sample_is_an_event_whatever_the_model_said(world: World) -> None:
    run = claim_by_hand(world, job := world.queue())
    said = Sample(seq=0, at=1.0, step=3, prompt="Hi?", text="a\0b")
    RunRecorder(world.db, world.storage, run.id, run.epoch).report([said, said])
    (event,) = [event for event in world.events(job) if event.data is not None]
    assert (event.type, event.message) == ("message", "Sample at step 3: Hi? → a\ufffdb")
    assert event.data == {"step": 3, "prompt": "Hi?", "text": "a\ufffdb"}, "PostgreSQL has no NUL"


def test_checkpoints_are_callable_models(world: World) -> None:
    job = world.tick_to(world.queue(), JobState.SUCCEEDED)
    with world.db.read() as tx:
        checkpoint = checkpoints.latest(tx, job.id)
        assert checkpoint is not None
        model = models.get(tx, PROJECT, checkpoint.model_id)
    assert model.id == f"{job.fine_tuned_model}:ckpt-step-4"
    assert model.is_checkpoint
    assert "Checkpoint created at step 2" in world.messages(job)


def test_the_result_file_has_one_line_per_step(world: World) -> None:
    lines = world.result_csv(world.tick_to(world.queue(), JobState.SUCCEEDED)).splitlines()
    assert lines[0] == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2", "3", "4"]
    assert float(lines[4].split(",")[1]) == loss(4)


def test_a_job_with_a_bad_file_fails_with_line_numbers(world: World) -> None:
    job = world.create(world.upload([*GOOD_LINES, b"{broken", {"prompt": 1, "completion": "x"}]))
    job = world.tick_to(job, JobState.FAILED)
    assert job.error is not None
    assert job.error["code"] == "invalid_training_file"
    assert job.error["param"] == "training_file"
    assert "line 13" in job.error["message"]
    assert "line 14" in job.error["message"]


def test_a_deleted_validation_file_fails_the_job_that_needs_it(world: World) -> None:
    unused = world.upload(GOOD_LINES)
    with world.db.write() as tx:
        files.delete(tx, PROJECT, unused.id)
    job = world.create(world.upload(GOOD_LINES), validation_file_id=unused.id)
    error = world.tick_to(job, JobState.FAILED).error
    assert error is not None
    assert error["param"] == "validation_file"


@pytest.mark.parametrize("step", [1, 4])
def test_a_pause_and_a_resume_change_nothing_in_the_result(build: Build, step: int) -> None:
    world, gate = gated(build, step)
    job = world.queue()
    world.tick_until(gate.reached.is_set)
    assert world.wish(jobs.request_pause, job).state == JobState.PAUSING
    gate.opened.set()
    world.tick_to(job, JobState.PAUSED)
    assert world.run(job).outcome == "paused"
    assert world.job(job).fine_tuned_model is None
    world.wish(jobs.request_resume, job)
    job = world.tick_to(job, JobState.SUCCEEDED)
    assert job.trained_tokens == 6 * TOKENS_PER_STEP
    assert len(world.result_csv(job).splitlines()) == 7
    assert f"The job continues from step {step}" in world.messages(job)


def test_a_pause_taken_back_in_time_stops_nothing(build: Build) -> None:
    world, gate = gated(build, step=3)
    job = world.queue()
    world.tick_until(gate.reached.is_set)
    world.wish(jobs.request_pause, job)
    assert world.wish(jobs.request_resume, job).state == JobState.RUNNING
    gate.opened.set()
    job = world.tick_to(job, JobState.SUCCEEDED)
    assert world.run(job).attempt == 1


@pytest.mark.parametrize("step", [1, 3, 7])
def test_a_running_job_is_cancelled_after_its_step_and_leaves_no_model(build: Build, step: int) -> None:
    world, gate = gated(build, step)  # step 7 is behind the last: the artifact is being written
    job = world.queue()
    world.tick_until(gate.reached.is_set)
    world.wish(jobs.request_cancel, job)
    gate.opened.set()
    job = world.tick_to(job, JobState.CANCELLED)
    assert job.fine_tuned_model is None
    assert world.run(job).outcome == "cancelled"


@pytest.mark.parametrize("state", [JobState.VALIDATING_FILES, JobState.QUEUED, JobState.PAUSED])
def test_a_waiting_job_is_cancelled_at_once(world: World, state: JobState) -> None:
    job = world.queue() if state != JobState.VALIDATING_FILES else world.create(world.upload(GOOD_LINES))
    if state == JobState.PAUSED:
        world.wish(jobs.request_pause, job)
    assert world.wish(jobs.request_cancel, job).state == JobState.CANCELLED
    world.orchestrator.tick()
    world.runner.join(PATIENCE_S)
    assert world.job(job).state == JobState.CANCELLED


def test_a_job_paused_in_the_queue_starts_only_when_resumed(world: World) -> None:
    job = world.queue()
    world.wish(jobs.request_pause, job)
    world.orchestrator.tick()
    assert world.job(job).state == JobState.PAUSED
    world.wish(jobs.request_resume, job)
    world.tick_to(job, JobState.SUCCEEDED)


def test_a_run_that_ignores_its_wish_is_killed_after_the_grace(build: Build) -> None:
    world, gate = gated(build, step=3, stop_grace_s=0.001)
    job = world.queue()
    world.tick_until(gate.reached.is_set)
    world.wish(jobs.request_cancel, job)
    world.tick_to(job, JobState.CANCELLED)
    gate.opened.set()
    assert world.launcher.join(PATIENCE_S)
    assert world.job(job).state == JobState.CANCELLED
    with world.db.read() as tx:
        assert not [model for model in models.all_live(tx) if not model.is_checkpoint]


def test_draining_checkpoints_and_requeues_and_the_next_orchestrator_goes_on(build: Build) -> None:
    world, gate = gated(build, step=3)
    running, waiting = world.queue(), world.queue()
    world.tick_until(gate.reached.is_set)
    drained: list[bool] = []
    drain = threading.Thread(target=lambda: drained.append(world.orchestrator.drain(PATIENCE_S)))
    drain.start()
    world.tick_until(lambda: world.orchestrator._drain_until is not None)
    world.orchestrator.tick()
    gate.opened.set()
    world.tick_until(lambda: not drain.is_alive())
    assert drained == [True]
    assert world.run(running).outcome == "requeued"
    assert [world.job(job).state for job in (running, waiting)] == [JobState.QUEUED, JobState.QUEUED]
    restarted = build(make_fit=lambda storage: Rehearsal(storage, 6))
    assert restarted.tick_to(running, JobState.SUCCEEDED).trained_tokens == 6 * TOKENS_PER_STEP
    restarted.tick_to(waiting, JobState.SUCCEEDED)


def test_jobs_start_by_priority_and_then_age(world: World) -> None:
    first, second, urgent = world.queue(), world.queue(), world.queue(priority=5)
    for job in (first, second, urgent):
        world.tick_to(job, JobState.SUCCEEDED)
    order = sorted((first, second, urgent), key=lambda job: world.job(job).started_at or 0.0)
    assert [job.id for job in order] == [urgent.id, first.id, second.id]


def test_a_job_that_can_never_fit_waits_with_one_warning(world: World) -> None:
    huge, small = world.queue(num_workers=9), world.queue()
    world.tick_to(small, JobState.SUCCEEDED)
    assert world.job(huge).state == JobState.QUEUED
    assert len([text for text in world.messages(huge) if "more workers" in text]) == 1
