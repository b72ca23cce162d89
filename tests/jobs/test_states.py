"""Every sequence of wishes and run endings keeps a job and its runs in a legal state, and lets it end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import InvalidRequest
from service.jobs import endings
from service.jobs.publish import run_key
from service.jobs.recorder import RunRecorder
from service.jobs.rehearsal import Rehearsal
from service.jobs.states import Desired, JobState
from service.store import jobs, runs
from service.store.tables import Job, Run
from tests.jobs.world import PROJECT, World, make_world
from training.spec import TrainSpec

WISHES = {"cancel": jobs.request_cancel, "pause": jobs.request_pause, "resume": jobs.request_resume}
ENDINGS: dict[str, Callable[..., bool]] = {
    "stopped": lambda tx, run: endings.stopped(tx, run, step=0),
    "killed": lambda tx, run: endings.stopped(tx, run, step=None, forced=True),
    "lost": lambda tx, run: endings.lost(tx, run, reason="gone", max_attempts=3),
    "failed": lambda tx, run: endings.failed(tx, run, code="out_of_memory", message="too big"),
}
ACTIONS = [*WISHES, *ENDINGS, "claim", "train"]


def live_runs(world: World) -> list[Run]:
    with world.db.read() as tx:
        return runs.active(tx)


def act(world: World, job: Job, action: str) -> None:
    """One thing that a user, the orchestrator or a driver may do now; what cannot happen now does nothing."""
    if action in WISHES:
        try:
            with world.db.write() as tx:
                WISHES[action](tx, PROJECT, job.id)
        except InvalidRequest:
            pass
    elif action == "claim" and world.job(job).state == JobState.QUEUED:
        with world.db.write() as tx:
            jobs.move(tx, job.id, JobState.RUNNING, expect={JobState.QUEUED})
            runs.start(tx, job.id, epoch=1, num_workers=1)
    elif action in ENDINGS:
        for run in live_runs(world):
            with world.db.write() as tx:
                ENDINGS[action](tx, run)
    elif action == "train":
        for run in live_runs(world):
            recorder = RunRecorder(world.db, world.storage, run.id, run.epoch)
            Rehearsal(world.storage)(TrainSpec.model_validate(job.spec), run_key(job.id), recorder)


def check(world: World, job: Job) -> None:
    """What holds between any two actions."""
    job, live = world.job(job), live_runs(world)
    state = JobState(job.state)
    assert len(live) == (1 if state.has_live_run else 0)
    assert (job.fine_tuned_model is not None) == (state == JobState.SUCCEEDED)
    assert (job.finished_at is not None) == state.is_terminal
    assert (job.error is not None) == (state == JobState.FAILED)
    if state in (JobState.PAUSING, JobState.PAUSED):
        assert job.desired == Desired.PAUSE or state == JobState.PAUSING
    if state == JobState.QUEUED:
        assert job.desired == Desired.RUN


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.sampled_from(ACTIONS), max_size=12))
def test_every_sequence_of_wishes_and_endings_is_legal_and_can_end(actions: list[str]) -> None:
    with TemporaryDirectory() as home:
        world = make_world(Path(home))
        job = world.queue()
        for action in actions:
            act(world, job, action)
            check(world, job)
        for action in ("resume", "claim", "train", "claim", "train"):
            act(world, job, action)
            check(world, job)
        assert JobState(world.job(job).state).is_terminal
        world.runner.close()
        world.db.close()
