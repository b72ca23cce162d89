"""The one process that moves jobs. `Orchestrator.tick` is its table of contents. Plain Python: no Ray, no HTTP.

All state is in the database, so an orchestrator may die anywhere and its successor goes on. Whatever it writes, it
first proves in the same transaction that it still holds the lease: a second one, or a revived one, writes nothing.
Nothing in a tick blocks; what takes time is a task or a run.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from sqlalchemy.orm import Session

from service.jobs import endings
from service.jobs.launchers import Launcher
from service.jobs.preparation import Problem, find_problem, is_ready_to_plan
from service.jobs.queue import Queue, worker_range
from service.jobs.states import Desired, JobKind, JobState
from service.jobs.task_runners import TaskRunner
from service.jobs.tasks import LEASE_S, MAX_ATTEMPTS, retry_or_give_up
from service.settings import Settings
from service.store import events, jobs, leases, runs, tasks
from service.store.database import Database, now
from service.store.jobs import StateConflict
from service.store.leases import LeaseLost
from service.store.tables import Job, Run

log = logging.getLogger(__name__)

LEASE = "orchestrator"
LEASE_TTL_S = 10.0
LAUNCH_GRACE_S = 5.0  # a run without a driver so long after its row was never launched
START_PATIENCE = 3  # heartbeat time-outs that a driver's process gets to its first heartbeat on a busy machine
CLEAN_EVERY_S = 600.0
GROWTH_S = 60.0  # of work that a run must have behind and before it, to be worth a restart with more workers


class Fleet(Protocol):
    """The deployments that should exist; brought about without waiting for them."""

    def reconcile(self) -> None:
        """Start and stop what differs from what is wanted. Returns at once."""
        ...


class Orchestrator:
    """Runs ticks until another orchestrator takes over. One thread calls `tick`; `drain` may come from any."""

    def __init__(
        self, settings: Settings, db: Database, launcher: Launcher, runner: TaskRunner, fleet: Fleet, holder: str
    ) -> None:
        """`holder` names who may take the lease back at once after a restart."""
        self._settings, self._db, self._holder = settings, db, holder
        self._launcher, self._runner, self._fleet = launcher, runner, fleet
        self._queue = Queue(launcher)
        self._epoch: int | None = None
        self._held_until = 0.0  # monotonic; when the lease should be prolonged if nothing was written
        self._next_cleaning = 0.0  # monotonic
        self._growing = ""  # the run that was last asked to make way for one with more workers
        self._drain_until: float | None = None  # monotonic; set once draining began
        self._drained = threading.Event()

    def tick(self) -> None:
        """One round. LeaseLost when another orchestrator has taken over; everything else is logged and retried."""
        if not self._hold_lease():
            return
        work = (self._plan, self._run_tasks, self._stop, self._reap, self._claim, self._grow)
        for step in (self._clean, *(work if self._has_work() else ()), self._reconcile):
            try:
                step()
            except LeaseLost:
                raise
            except StateConflict as conflict:
                log.info("%s; the next tick sees it", conflict)
            except Exception:  # process edge: one broken object must not stop the others; the next tick tries again
                log.exception("%s failed", step.__name__)

    def run(self, stop: threading.Event) -> None:
        """Tick until stopped or until the lease is lost."""
        while not stop.wait(self._settings.tick_s):
            try:
                self.tick()
            except LeaseLost as lost:
                log.warning("this orchestrator stops: %s", lost)
                return
            except Exception:  # process edge: the database may be away for a moment
                log.exception("tick failed")

    def drain(self, grace_s: float) -> bool:
        """Claim nothing more; have all runs checkpoint and go back to the queue. Returns whether none is left.

        Runs that do not stop in time are killed; their jobs continue from their last checkpoint."""
        if self._drain_until is None:
            self._drain_until = time.monotonic() + grace_s
        return self._drained.wait(grace_s + 4 * self._settings.tick_s + 1.0)

    # Steps of a tick

    def _clean(self) -> None:
        """Every now and then a task that removes files whose time is over."""
        if time.monotonic() < self._next_cleaning:
            return
        with self._write() as tx:
            if not tasks.has_open(tx, "clean_files", {}):
                tasks.add(tx, "clean_files", {})
        self._next_cleaning = time.monotonic() + CLEAN_EVERY_S

    def _plan(self) -> None:
        """Jobs whose files are validated are planned by a task; jobs with a bad file fail."""
        with self._db.read() as tx:
            waiting = jobs.in_state(tx, JobState.VALIDATING_FILES)
            problems = {job.id: find_problem(tx, job) for job in waiting}
            payloads = [{"job_id": job.id} for job in waiting if problems[job.id] is None and is_ready_to_plan(tx, job)]
            payloads = [payload for payload in payloads if not tasks.has_open(tx, "plan_job", payload)]
        for job in waiting:
            problem = problems[job.id]
            if problem is not None:
                self._fail(job, problem)
        if payloads:
            with self._write() as tx:
                for payload in payloads:
                    tasks.add(tx, "plan_job", payload)

    def _run_tasks(self) -> None:
        """Hand due tasks to workers; those of lost workers are retried."""
        lost = self._runner.take_lost()
        if lost:
            with self._write() as tx:
                for task in lost:
                    if tasks.get(tx, task.id).state == "leased":
                        retry_or_give_up(tx, task, "its worker was lost")
        with self._db.read() as tx:
            num_open = tasks.num_open(tx)
        num_free = self._runner.num_free()
        if not num_open or not num_free:
            return
        with self._write() as tx:
            claimed = tasks.claim(tx, num_free, LEASE_S)
            hopeless = [task for task in claimed if task.attempt > MAX_ATTEMPTS]  # each time its worker was lost
            for task in hopeless:
                retry_or_give_up(tx, task, "its worker was lost too often")
        for task in claimed:
            if task not in hopeless:
                self._runner.start(task)

    def _stop(self) -> None:
        """Runs hear wishes from their own driver; those that do not obey in time are killed."""
        is_draining = self._drain_until is not None
        for run, job in self._live():
            if is_draining:
                self._launcher.ask_stop(run.id)
            if self._is_overdue(job):
                self._launcher.kill(run.id)
                with self._write() as tx:
                    endings.stopped(tx, run, step=None, forced=True)
        if is_draining and not self._live():
            self._drained.set()

    def _reap(self) -> None:
        """End the runs whose driver is gone or silent; their jobs continue from the last checkpoint."""
        for run, _job in self._live():
            has_begun = run.heartbeat_at > run.created_at
            patience_s = self._settings.heartbeat_timeout_s * (1 if has_begun else START_PATIENCE)
            is_silent = now() - run.heartbeat_at > patience_s
            is_gone = now() - run.created_at > LAUNCH_GRACE_S and not self._launcher.is_alive(run.id)
            if is_silent or is_gone:
                self._launcher.kill(run.id)
                with self._write() as tx:
                    endings.lost(tx, run, reason="The worker was lost", max_attempts=self._settings.max_attempts)

    def _claim(self) -> None:
        """Start queued jobs in order, as far as they fit."""
        with self._db.read() as tx:
            queued = jobs.in_state(tx, JobState.QUEUED)
        if self._drain_until is not None:
            return
        for job, num_workers in self._queue.startable(queued):
            run = self._start_run(job, num_workers)
            self._launcher.start(run)  # if we die before this, the run is reaped and the job queued again
        for job in self._queue.take_never_fitting():
            text = "The job waits: it asks for more workers than this cluster has resources for"
            with self._write() as tx:
                events.add(tx, job, text, level="warn", dedup_key=f"{job.id}:never-fits")

    def _grow(self) -> None:
        """Once there is room for all workers of a run that began with fewer, and no job that could use it waits, have
        the run checkpoint and begin again."""
        live = self._live()
        with self._db.read() as tx:
            queued = jobs.in_state(tx, JobState.QUEUED)
        if self._drain_until is not None or any(run.id == self._growing for run, _job in live):
            return
        if any(worker_range(job)[0] <= self._launcher.num_slots() for job in queued):
            return
        for run, job in live:
            _least, most = worker_range(job)
            num_workers = most if run.num_workers is None else run.num_workers
            if num_workers == most or job.desired != Desired.RUN or not _is_worth_a_restart(run, job):
                continue
            if num_workers + self._launcher.num_free() >= most:
                self._launcher.ask_stop(run.id)
                self._growing = run.id
                text = f"There is room for {most} workers now: the run makes a checkpoint and begins again with them."
                with self._write() as tx:
                    events.add(tx, job, text, dedup_key=f"{run.id}:grows")
                return

    def _reconcile(self) -> None:
        """Bring the deployments in line with the models."""
        self._fleet.reconcile()

    # Helpers

    def _has_work(self) -> bool:
        """Whether anything is open. Asked first, because a tick without work should cost next to nothing: on a small
        machine the engines need the processor."""
        if self._drain_until is not None:
            return True
        with self._db.read() as tx:
            return jobs.any_open(tx) or tasks.num_open(tx) > 0

    def _start_run(self, job: Job, num_workers: int) -> Run:
        assert self._epoch is not None
        with self._write() as tx:
            started_at = now() if job.started_at is None else job.started_at
            job = jobs.move(tx, job.id, JobState.RUNNING, expect={JobState.QUEUED}, started_at=started_at)
            run = runs.start(tx, job.id, self._epoch, num_workers)
            begins = "Sweep started" if job.kind == JobKind.SWEEP else "Fine-tuning job started"
            events.add(tx, job, f"The job continues {endings.where_from(tx, job)}" if run.attempt > 1 else begins)
            least, most = worker_range(job)
            if least < most:
                why = "" if num_workers == most else ": the cluster has no room for more"
                text = f"Runs with {num_workers} of up to {most} workers{why}."
                events.add(tx, job, text, data={"num_workers": num_workers})
        return run

    def _fail(self, job: Job, problem: Problem) -> None:
        with self._write() as tx:
            endings.fail_job(tx, job, code=problem.code, message=problem.message, param=problem.param)

    def _live(self) -> list[tuple[Run, Job]]:
        with self._db.read() as tx:
            return [(run, jobs.by_id(tx, run.job_id)) for run in runs.active(tx)]

    def _is_overdue(self, job: Job) -> bool:
        if self._drain_until is not None and time.monotonic() > self._drain_until:
            return True
        if job.desired == Desired.RUN or job.stop_requested_at is None:
            return False
        return now() - job.stop_requested_at > self._settings.stop_grace_s

    def _hold_lease(self) -> bool:
        """Take the lease if it is free, prolong it in time; whether it is ours."""
        if self._epoch is None:
            with self._db.write() as tx:
                self._epoch = leases.acquire(tx, LEASE, self._holder, LEASE_TTL_S)
            if self._epoch is None:
                return False
            log.info("orchestrator %s holds the lease, epoch %d", self._holder, self._epoch)
        elif time.monotonic() > self._held_until:
            with self._write():
                pass
        return True

    @contextmanager
    def _write(self) -> Iterator[Session]:
        """A transaction that counts only while the lease is ours."""
        assert self._epoch is not None, "no write before the lease"
        with self._db.write() as tx:
            leases.hold(tx, LEASE, self._epoch, LEASE_TTL_S)
            yield tx
        self._held_until = time.monotonic() + LEASE_TTL_S / 4


def _is_worth_a_restart(run: Run, job: Job) -> bool:
    finish_at = job.estimated_finish_at  # known from the second step on
    return finish_at is not None and run.created_at + GROWTH_S < now() < finish_at - GROWTH_S
