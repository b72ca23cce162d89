"""Whatever dies, and whatever is delivered twice, a job ends right."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from service.jobs import endings
from service.jobs.launchers import InProcessLauncher
from service.jobs.orchestrator import LEASE
from service.jobs.publish import artifact_key, publish, run_key
from service.jobs.recorder import RunRecorder
from service.jobs.rehearsal import TOKENS_PER_STEP, Rehearsal
from service.jobs.run_driver import RunDriver
from service.jobs.states import JobState
from service.store import checkpoints, jobs, leases, models, runs, tasks
from service.store.leases import LeaseLost
from service.store.runs import RunLost
from service.store.tables import Checkpoint, Job, Run
from tests.jobs.gate import Build, gated
from tests.jobs.world import GOOD_LINES, PATIENCE_S, World, make_orchestrator
from training.artifact import read_manifest
from training.progress import ProgressItem, Wish
from training.spec import TrainSpec


class Crash(Exception):
    """What a broken worker raises."""


class CrashAt:
    """Breaks the first runs before a step."""

    def __init__(self, step: int, num_crashes: int = 1, words: str = "first line\nthe socket was closed") -> None:
        self.step, self.num_left, self.words = step, num_crashes, words

    def __call__(self, step: int) -> None:
        """Called by the rehearsal before each step."""
        if step == self.step and self.num_left:
            self.num_left -= 1
            raise Crash(self.words)


def crashing(build: Build, step: int, num_crashes: int = 1, **choices: Any) -> World:
    """A platform whose first runs of 6 steps crash."""
    crash = CrashAt(step, num_crashes)
    return build(make_fit=lambda storage: Rehearsal(storage, 6, 2, crash), **choices)


def claim_by_hand(world: World, job: Job) -> Run:
    """The rows of a run whose driver was never started."""
    with world.db.write() as tx:
        jobs.move(tx, job.id, JobState.RUNNING)
        return runs.start(tx, job.id, epoch=1, num_workers=1)


def lose(world: World, run: Run) -> None:
    """What the orchestrator does with a run whose driver is gone."""
    with world.db.write() as tx:
        assert endings.lost(tx, run, reason="The worker was lost", max_attempts=3)


def rehearse(world: World, job: Job, run: Run, recorder: RunRecorder | None = None) -> RunRecorder:
    """A run to its end, on this thread."""
    recorder = recorder or RunRecorder(world.db, world.storage, run.id, run.epoch)
    Rehearsal(world.storage)(TrainSpec.model_validate(job.spec), run_key(job.id), recorder)
    return recorder


def rows(world: World, job: Job) -> tuple[int, int, int]:
    """Numbers of events, models and checkpoints."""
    with world.db.read() as tx:
        live = models.all_live(tx)
        latest = checkpoints.latest(tx, job.id)
    return len(world.events(job)), len(live), 0 if latest is None else latest.seq


class Recording(RunRecorder):
    """Keeps what it was told, and is told everything twice."""

    def __init__(self, world: World, run: Run) -> None:
        super().__init__(world.db, world.storage, run.id, run.epoch)
        self.batches: list[list[ProgressItem]] = []

    def report(self, items: list[ProgressItem]) -> Wish:
        """Deliver, lose the reply, deliver again."""
        self.batches.append(items)
        super().report(items)
        return super().report(items)


def test_a_crashed_run_continues_from_its_last_checkpoint(build: Build) -> None:
    world = crashing(build, step=4)
    job = world.tick_to(world.queue(), JobState.SUCCEEDED)
    assert world.run(job).attempt == 2
    assert world.run(job).resumed_from == 2
    assert job.trained_tokens == 6 * TOKENS_PER_STEP
    assert len(world.result_csv(job).splitlines()) == 7
    texts = world.messages(job)
    assert "The worker crashed (the socket was closed); continuing from step 2" in texts
    assert not [text for text in texts if "Traceback" in text]


def test_a_run_that_crashes_again_and_again_without_progress_fails_the_job(build: Build) -> None:
    world = crashing(build, step=4, num_crashes=99)
    job = world.tick_to(world.queue(), JobState.FAILED)
    assert job.error is not None
    assert job.error["code"] == "crashed"
    assert "the socket was closed" in job.error["message"]
    assert world.run(job).attempt == 1 + world.settings.max_attempts  # the first one got on


def test_a_worker_that_ray_ends_for_want_of_memory_says_so_and_what_to_change(build: Build) -> None:
    """In the words of Ray's memory monitor, or of a worker that could not tell the others; those for any other death
    speak of OOM as one possible cause."""
    killed = "[Rank 0]\nray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.\n..."
    alone = "[Rank 1]\nRuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\n..."
    other = "The actor died unexpectedly; there are some potential root causes: (1) killed by SIGKILL by OOM killer"
    for words, code in ((killed, "out_of_memory"), (alone, "out_of_memory"), (other, "crashed")):
        crash = CrashAt(4, 99, words)
        world = build(make_fit=lambda storage, crash=crash: Rehearsal(storage, 6, 2, crash))
        job = world.tick_to(world.queue(), JobState.FAILED)
        assert job.error is not None
        assert job.error["code"] == code
        assert ("suggested_request" in job.error) == (code == "out_of_memory")


def test_a_reason_shows_no_secret(build: Build) -> None:
    words = "cannot read s3://user:pass/word@p@host/x with sk-abcdefghijkl and https://hf_abcdefgh@hub/y"
    crash = CrashAt(4, 1, f"{words} or postgresql://user:a?b#c@db/app")
    world = build(make_fit=lambda storage: Rehearsal(storage, 6, 2, crash))
    (text,) = (text for text in world.messages(world.tick_to(world.queue(), JobState.SUCCEEDED)) if "crashed" in text)
    assert "s3://[redacted]@host/x with [redacted] and https://[redacted]@hub/y" in text
    assert "postgresql://[redacted]@db/app" in text, "SQLAlchemy takes a password with ? and # too"


def test_a_run_without_a_driver_is_taken_back_and_started_again(build: Build) -> None:
    world = build(heartbeat_timeout_s=0.001)
    job = world.queue()
    claim_by_hand(world, job)
    job = world.job(job)
    world.orchestrator.tick()
    assert "The worker was lost; continuing from step 0" in world.messages(job)
    restarted = build()
    restarted.tick_to(job, JobState.SUCCEEDED)


@pytest.mark.parametrize(
    ("request_wish", "state"), [(jobs.request_cancel, JobState.CANCELLED), (jobs.request_pause, JobState.PAUSED)]
)
def test_a_lost_run_ends_as_its_owner_wished(build: Build, request_wish: Any, state: JobState) -> None:
    world = build(heartbeat_timeout_s=0.001)
    job = world.queue()
    claim_by_hand(world, job)
    world.wish(request_wish, job)
    assert world.tick_to(job, state).fine_tuned_model is None


def test_a_reaped_driver_writes_nothing_more_and_its_workers_are_told_to_stop(build: Build) -> None:
    world, gate = gated(build, step=3)
    job = world.queue()
    world.tick_until(gate.reached.is_set)
    run = world.run(job)
    with world.db.write() as tx:
        runs.end(tx, run.id, "lost")
    before = rows(world, job)
    gate.opened.set()
    assert world.launcher.join(PATIENCE_S)
    assert rows(world, job) == before
    recorder = RunRecorder(world.db, world.storage, run.id, run.epoch)
    assert recorder.report([]) is Wish.CANCEL
    with pytest.raises(RunLost):
        RunRecorder(world.db, world.storage, run.id, run.epoch).heartbeat()


def test_a_second_orchestrator_waits_and_takes_over_when_the_first_is_gone(world: World) -> None:
    second = make_orchestrator(world.settings, world.db, world.launcher, world.runner, holder="second")
    world.orchestrator.tick()
    job = world.queue()
    second.tick()
    assert world.job(job).state == JobState.QUEUED
    with world.db.write() as tx:
        leases.release(tx, LEASE, epoch=1)
    second.tick()
    with pytest.raises(LeaseLost):
        world.orchestrator._start_run(job, 1)
    assert len(world.messages(job)) == len(set(world.messages(job)))


def test_an_orchestrator_that_lost_its_lease_stops_by_itself(world: World) -> None:
    world.orchestrator.tick()
    with world.db.write() as tx:
        leases.acquire(tx, LEASE, "first", ttl_s=60.0)  # its own successor after a restart
    world.queue()
    thread = threading.Thread(target=world.orchestrator.run, args=(threading.Event(),))
    thread.start()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_a_restarted_orchestrator_takes_its_own_lease_back_and_adopts_the_runs(build: Build) -> None:
    world, gate = gated(build, step=3)
    job = world.queue()
    world.tick_until(gate.reached.is_set)
    successor = make_orchestrator(world.settings, world.db, world.launcher, world.runner)
    successor.tick()
    gate.opened.set()
    assert world.launcher.join(PATIENCE_S)
    assert world.job(job).state == JobState.SUCCEEDED
    assert world.run(job).attempt == 1


def test_every_batch_delivered_twice_leaves_the_same_rows(world: World) -> None:
    plain, doubled = world.queue(), world.queue()
    rehearse(world, plain, claim_by_hand(world, plain))
    run = claim_by_hand(world, doubled)
    rehearse(world, doubled, run, Recording(world, run))
    texts = [
        [text.replace(world.job(job).fine_tuned_model or "?", "it") for text in world.messages(job)]
        for job in (plain, doubled)
    ]
    assert texts[0] == texts[1]
    assert world.job(doubled).trained_tokens == world.job(plain).trained_tokens
    assert world.result_csv(doubled) == world.result_csv(plain)


def test_another_driver_that_repeats_old_batches_changes_nothing(world: World) -> None:
    job = world.queue()
    run = claim_by_hand(world, job)
    recorder = Recording(world, run)
    rehearse(world, job, run, recorder)
    before = rows(world, job)
    again = RunRecorder(world.db, world.storage, run.id, run.epoch)
    assert [again.report(batch) for batch in recorder.batches] == [Wish.CANCEL] * len(recorder.batches)
    assert rows(world, job) == before


def test_publishing_twice_makes_one_model(world: World) -> None:
    job = world.queue()
    run = claim_by_hand(world, job)
    rehearse(world, job, run)
    before = rows(world, job)
    manifest = read_manifest(world.storage, artifact_key(job.id))
    assert manifest is not None
    with pytest.raises(RunLost):
        publish(world.db, world.storage, run.id, run.epoch, artifact_key(job.id), manifest.hash())
    assert rows(world, job) == before


class DiesBeforePublishing(RunRecorder):
    """A driver that is killed when the artifact is there and its row is not."""

    def publish(self, key: str, manifest_hash: str) -> None:
        """Die."""
        raise Crash("killed")


def test_an_artifact_of_a_killed_driver_is_published_without_training_again(build: Build) -> None:
    world = build(make_fit=never)
    job = world.queue()
    run = claim_by_hand(world, job)
    with pytest.raises(Crash):
        rehearse(world, job, run, DiesBeforePublishing(world.db, world.storage, run.id, run.epoch))
    lose(world, run)
    job = world.tick_to(job, JobState.SUCCEEDED)
    assert world.run(job).attempt == 2
    assert job.trained_tokens == 4 * TOKENS_PER_STEP


def never(_storage: object) -> Any:
    """A `Fit` that must not be asked to train."""

    def fit(*_: object) -> None:
        raise AssertionError("trained again")

    return fit


def test_a_broken_artifact_is_never_published_but_written_anew(build: Build) -> None:
    world = build(make_fit=never)
    job = world.queue()
    run = claim_by_hand(world, job)
    with pytest.raises(Crash):
        rehearse(world, job, run, DiesBeforePublishing(world.db, world.storage, run.id, run.epoch))
    world.storage.write_bytes(f"{artifact_key(job.id)}/weights.json", b"{}")
    lose(world, run)
    restarted = build()
    job = restarted.tick_to(job, JobState.SUCCEEDED)
    assert restarted.storage.read_bytes(f"{artifact_key(job.id)}/weights.json") != b"{}"


@pytest.mark.parametrize("written", ["checkpoint", "artifact"])
def test_what_was_written_after_the_last_stored_numbers_is_trained_again(build: Build, written: str) -> None:
    world = build()
    job = world.queue()
    run = claim_by_hand(world, job)
    recorder = StopsHearingAfter(world, run, 3, written)
    with pytest.raises(Crash):
        rehearse(world, job, run, recorder)
    lose(world, run)
    job = world.tick_to(job, JobState.SUCCEEDED)
    assert world.run(job).resumed_from == 2  # though step 4 was in storage
    assert [line.split(",")[0] for line in world.result_csv(job).splitlines()[1:]] == ["1", "2", "3", "4"]
    assert job.trained_tokens == 4 * TOKENS_PER_STEP


class StopsHearingAfter(RunRecorder):
    """A driver that dies while its worker goes on until it has written the last checkpoint, or the artifact."""

    def __init__(self, world: World, run: Run, num_batches: int, written: str) -> None:
        super().__init__(world.db, world.storage, run.id, run.epoch)
        self.num_left, self.written = num_batches, written

    def report(self, items: list[ProgressItem]) -> Wish:
        """Store the first batches only; when the worker would tell what it wrote last, it dies."""
        if any(item.kind == self.written and getattr(item, "step", 0) == 4 for item in items):
            raise Crash("killed")
        if self.num_left == 0:
            return Wish.GO_ON
        self.num_left -= 1
        return super().report(items)


def test_a_checkpoint_deleted_by_a_run_that_could_not_say_so_is_no_model_any_more(build: Build) -> None:
    world = build(make_fit=lambda storage: Rehearsal(storage, 6, 2))
    job = world.queue()
    run = claim_by_hand(world, job)
    with pytest.raises(Crash):
        recorder = RunRecorder(world.db, world.storage, run.id, run.epoch)
        Rehearsal(world.storage, 6, 2, CrashAt(5))(TrainSpec.model_validate(job.spec), run_key(job.id), recorder)
    world.storage.delete(f"{run_key(job.id)}/checkpoints/step-000002")
    lose(world, run)
    world.tick_to(job, JobState.SUCCEEDED)
    assert world.run(job).resumed_from == 4
    with world.db.read() as tx:
        callable_steps = [model.step for model in models.all_live(tx)]
    assert callable_steps == [4, 6, 6]  # the last is the job's own model


def test_a_deleted_checkpoint_that_is_trained_again_is_a_model_again(build: Build) -> None:
    world = build()
    job = world.queue()
    run = claim_by_hand(world, job)
    with pytest.raises(Crash):
        rehearse(world, job, run, StopsHearingAfter(world, run, 3, "checkpoint"))
    world.storage.delete(f"{run_key(job.id)}/checkpoints/step-000002")  # the only one that was recorded
    lose(world, run)
    world.tick_to(job, JobState.SUCCEEDED)
    with world.db.read() as tx:
        live = models.all_live(tx)
    assert [model.step for model in live] == [2, 4, 4]
    assert live[0].id.endswith(":ckpt-step-2-2")  # ids are never reused


def test_a_task_whose_worker_dies_each_time_fails_its_file(world: World) -> None:
    file = world.upload(GOOD_LINES, validate=False)
    with world.db.write() as tx:
        task = tasks.add(tx, "validate_file", {"file_id": file.id})
        for _ in range(3):
            tasks.claim(tx, 1, lease_s=-1.0)  # claimed by workers that died at once
    job = world.create(file)
    job = world.tick_to(job, JobState.FAILED)
    assert job.error is not None
    assert job.error["code"] == "invalid_training_file"
    with world.db.read() as tx:
        assert tasks.get(tx, task.id).state == "failed"


def test_a_large_job_is_passed_for_a_while_but_does_not_starve(world: World) -> None:
    from service.jobs.queue import Queue

    launcher: InProcessLauncher = InProcessLauncher(world.settings, world.db, world.storage, never(None), num_slots=2)
    occupied, large, small = world.queue(), world.queue(num_workers=2), world.queue()
    hold = threading.Event()
    launcher._fit = lambda *_: hold.wait(PATIENCE_S) and None  # type: ignore[assignment]
    launcher.start(claim_by_hand(world, occupied))
    queue = Queue(launcher, patience_s=60.0)
    assert [job.id for job, _ in queue.startable([large, small], clock=lambda: 0.0)] == [small.id]
    assert [job.id for job, _ in queue.startable([large, small], clock=lambda: 59.0)] == [small.id]
    assert [job.id for job, _ in queue.startable([large, small], clock=lambda: 61.0)] == []
    hold.set()
    assert launcher.join(PATIENCE_S)
    assert next(queue.startable([large, small], clock=lambda: 62.0))[0].id == large.id


def test_steps_are_compared_as_numbers_also_beyond_a_million(build: Build) -> None:
    world = build()
    job = world.queue()
    run, folder = claim_by_hand(world, job), f"{run_key(job.id)}/checkpoints"
    for step in (999_999, 1_000_000, 1_000_001):
        world.storage.write_bytes(f"{folder}/step-{step:06d}/state", b"-")
    driver = RunDriver(world.db, world.storage, run, Rehearsal(world.storage, 6, 2), world.settings)
    driver._drop_unrecorded_checkpoints(Checkpoint(step=1_000_000))
    assert world.storage.list_names(folder) == ["step-1000000", "step-999999"]
