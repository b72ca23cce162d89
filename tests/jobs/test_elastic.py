"""A job with a range of workers runs with as many as there is room for, and says with how many."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from service.jobs import orchestrator
from service.jobs.launchers import InProcessLauncher
from service.jobs.queue import Queue
from service.jobs.recorder import RunRecorder
from service.jobs.rehearsal import Rehearsal
from service.jobs.states import JobState
from service.store import jobs, runs
from service.store.database import now
from service.store.tables import Job
from tests.jobs.gate import gated
from tests.jobs.world import PATIENCE_S, World
from training.spec import TrainSpec

Build = Callable[..., World]


class Room:
    """A launcher with so many slots, whose runs last until they are released, and a queue before it."""

    def __init__(self, world: World, num_slots: int, num_taken: int = 0) -> None:
        self._world, self._released = world, threading.Event()
        self._launcher = InProcessLauncher(world.settings, world.db, world.storage, self._hold, num_slots)
        self._queue = Queue(self._launcher, patience_s=60.0, fill_s=10.0)
        if num_taken:
            self._start(world.queue(), num_taken)

    def starts(self, at: float, *waiting: Job) -> list[tuple[Job, int]]:
        """What the queue starts at that moment, with how many workers."""
        started = []
        for job, num_workers in self._queue.startable(list(waiting), clock=lambda: at):
            self._start(job, num_workers)
            started.append((job, num_workers))
        return started

    def release(self) -> None:
        """End all that runs."""
        self._released.set()
        assert self._launcher.join(PATIENCE_S)
        self._released.clear()

    def _start(self, job: Job, num_workers: int) -> None:
        with self._world.db.write() as tx:
            jobs.move(tx, job.id, JobState.RUNNING)
            run = runs.start(tx, job.id, epoch=1, num_workers=num_workers)
        self._launcher.start(run)

    def _hold(self, spec: TrainSpec, run_key: str, recorder: RunRecorder) -> None:
        assert self._released.wait(PATIENCE_S)


@pytest.fixture
def room(world: World) -> Iterator[Callable[..., Room]]:
    """Makes rooms, and clears them in the end."""
    made: list[Room] = []

    def make(num_slots: int, num_taken: int = 0) -> Room:
        made.append(Room(world, num_slots, num_taken))
        return made[-1]

    yield make
    for each in made:
        each.release()


def elastic(world: World, least: int, most: int) -> Job:
    return world.queue(min_workers=least, num_workers=most)


def test_all_workers_are_taken_when_there_is_room(world: World, room: Callable[..., Room]) -> None:
    first, second = elastic(world, 1, 3), elastic(world, 1, 4)
    assert room(4).starts(0.0, first, second) == [(first, 3)], "the second waits a little for more than one"


def test_a_cluster_that_has_no_more_is_not_waited_for(world: World, room: Callable[..., Room]) -> None:
    job = elastic(world, 1, 4)
    assert room(2).starts(0.0, job) == [(job, 2)]


def test_fewer_are_taken_after_a_wait_that_keeps_the_room(world: World, room: Callable[..., Room]) -> None:
    half, job, small = room(4, num_taken=2), elastic(world, 1, 4), world.queue()
    assert half.starts(0.0, job, small) == []
    assert half.starts(9.0, job, small) == []
    assert half.starts(11.0, job, small) == [(job, 2)]


def test_a_wait_ends_with_room_for_all(world: World, room: Callable[..., Room]) -> None:
    half, job = room(4, num_taken=2), elastic(world, 1, 4)
    assert half.starts(0.0, job) == []
    half.release()
    assert half.starts(1.0, job) == [(job, 4)]


def test_a_job_without_room_for_its_fewest_is_passed_for_a_while(world: World, room: Callable[..., Room]) -> None:
    full, job, small, late = room(4, num_taken=3), elastic(world, 2, 4), world.queue(), world.queue()
    assert full.starts(0.0, job, small) == [(small, 1)]
    assert full.starts(61.0, job, late) == []
    full.release()
    assert full.starts(62.0, job, late) == [(job, 4)]


def of(world: World, job: Job) -> dict[int, int | None]:
    with world.db.read() as tx:
        return runs.num_workers(tx, job.id)


def told(world: World, job: Job) -> list[str]:
    return [text for text in world.messages(job) if text.startswith("Runs with")]


def test_the_number_of_an_attempt_is_stored_and_told(build: Build) -> None:
    world = build(num_slots=2)
    wide, exact, plain = (
        world.queue(min_workers=1, num_workers=4),
        world.queue(min_workers=1, num_workers=2),
        world.queue(),
    )
    for job in (wide, exact, plain):
        world.tick_to(job, JobState.SUCCEEDED)
    assert [of(world, job) for job in (wide, exact, plain)] == [{1: 2}, {1: 2}, {1: 1}]
    assert told(world, wide) == ["Runs with 2 of up to 4 workers: the cluster has no room for more."]
    assert told(world, exact) == ["Runs with 2 of up to 2 workers."]
    assert told(world, plain) == []


def test_a_run_that_found_no_room_goes_back_to_the_queue_and_counts_as_no_crash(build: Build) -> None:
    attempts: list[str] = []

    class Crowded(Rehearsal):
        def __call__(self, spec: TrainSpec, run_key: str, recorder: RunRecorder) -> None:
            attempts.append(recorder.run_id)
            if len(attempts) < 4:
                recorder.requeue()  # as the run's actor does when Ray Train could not place the workers
            else:
                super().__call__(spec, run_key, recorder)

    world = build(make_fit=Crowded, max_attempts=1)
    job = world.tick_to(world.queue(), JobState.SUCCEEDED)
    assert world.run(job).attempt == 4
    with world.db.read() as tx:
        assert runs.num_lost(tx, job.id) == 0


def test_a_run_that_began_with_fewer_begins_again_once_there_is_room_for_all(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a checkpoint made for it: no step is lost."""
    monkeypatch.setattr(orchestrator, "GROWTH_S", -3600.0)  # rehearsals are short: any is worth it
    world, gate = gated(build, step=4, num_slots=1)
    job = world.queue(min_workers=1, num_workers=2)
    world.tick_until(gate.reached.is_set)
    world.orchestrator.tick()
    assert of(world, job) == {1: 1}, "no room, no restart"
    world.launcher._num_slots = 2
    world.orchestrator.tick()
    gate.opened.set()
    world.tick_to(job, JobState.SUCCEEDED)
    assert of(world, job) == {1: 1, 2: 2}
    assert told(world, job)[1] == "Runs with 2 of up to 2 workers."
    texts = world.messages(job)
    assert len([text for text in texts if "There is room for 2 workers now" in text]) == 1
    assert "The run was stopped at step 4; the job is back in the queue" in texts
    assert [text.partition(":")[0] for text in texts if "training loss" in text] == [f"Step {n}/6" for n in range(1, 7)]


@pytest.mark.parametrize(("behind_s", "before_s", "worth"), [(61, 61, True), (59, 999, False), (999, 59, False)])
def test_a_restart_must_be_worth_its_time(world: World, behind_s: float, before_s: float, worth: bool) -> None:
    job = world.queue()
    with world.db.write() as tx:
        run = runs.start(tx, job.id, epoch=1, num_workers=1)
        run.created_at = now() - behind_s
        jobs.change(tx, job.id, estimated_finish_at=now() + before_s)
    assert orchestrator._is_worth_a_restart(run, world.job(job)) is worth
