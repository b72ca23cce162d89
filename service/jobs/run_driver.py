"""One attempt at a job, from its first heartbeat to its ending, whoever does the training.

`RunDriver` is plain Python around a `Fit`; `run_actor.py` puts it into a Ray actor, `launchers.InProcessLauncher` into
a thread.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from service.jobs.publish import find_leftover, run_key
from service.jobs.recorder import RunRecorder
from service.jobs.states import JobKind
from service.jobs.sweep_driver import SweepDriver
from service.logs import job_id, redact
from service.metrics import Metrics
from service.settings import Settings
from service.store import checkpoints, jobs
from service.store.database import Database
from service.store.runs import RunLost
from service.store.tables import Checkpoint, Run
from service.trackers.chosen import trackers_of
from service.trackers.feed import Feed, end_all
from training.failure import says_out_of_memory
from training.spec import TrainSpec
from training.storage import Storage

log = logging.getLogger(__name__)

HEARTBEAT_S = 2.0
# How Ray says that its memory monitor ended a worker. Its words for any other death name "OOM" as a possible cause too.
_SAYS_MEMORY = re.compile(r"out of memory|low on memory|memory pressure|OutOfMemoryError")


class Fit(Protocol):
    """Trains until the run is over. What it raises counts only if the run has no ending by then."""

    def __call__(self, spec: TrainSpec, run_key: str, recorder: RunRecorder) -> None:
        """Report everything to the recorder; return or raise when no worker is left."""
        ...


class RunDriver:
    """Drives one run. `work` returns when the run has an ending and its resources are free."""

    def __init__(
        self,
        db: Database,
        storage: Storage,
        run: Run,
        fit: Fit,
        settings: Settings,
        numbers: Metrics | None = None,
    ) -> None:
        self.recorder = RunRecorder(db, storage, run.id, run.epoch, numbers)
        self._db, self._storage, self._run, self._fit, self._settings = db, storage, run, fit, settings
        self._feeds: list[Feed] = []

    def work(self) -> None:
        """Do the attempt. Never raises: whatever happened is stored with the run, or the run was ended by others."""
        job_id.set(self._run.job_id)
        with self._heartbeats():
            self._work()
        end_all(self._feeds, abandon=self.recorder.lost.is_set())

    def _work(self) -> None:
        try:
            self._attempt()
            reason, lacks_memory = "The training ended without a result", False
        except RunLost:
            log.warning("run %s was ended by the orchestrator", self._run.id)
            return
        except Exception as error:  # process edge: the checkpoint is kept and the job continues from it
            reason = f"The worker crashed ({last_line(error)})"
            lacks_memory = _SAYS_MEMORY.search(str(error)) is not None or says_out_of_memory(str(error))
            if not self.recorder.over.is_set():
                log.exception("run %s crashed", self._run.id)
        self._settle(reason, lacks_memory=lacks_memory)

    def _attempt(self) -> None:
        self.recorder.forget_missing_checkpoints()
        with self._db.read() as tx:
            job = jobs.by_id(tx, self._run.job_id)
            recorded = checkpoints.latest(tx, job.id)
        if job.kind == JobKind.SWEEP:
            SweepDriver(self._db, self.recorder, job).work()
            return
        resumed_step = 0 if recorded is None else recorded.step
        trackers = trackers_of(job, self._settings)
        self._feeds = [Feed(self._db, tracker, self._run, resumed_step) for tracker in trackers]
        leftover = find_leftover(self._storage, job.id, resumed_step)
        if leftover is not None:
            self.recorder.publish(*leftover)
            return
        self._drop_unrecorded_checkpoints(recorded)
        log.info("run %s: attempt %d begins to train", self._run.id, self._run.attempt)
        self._fit(TrainSpec.model_validate(job.spec), run_key(job.id), self.recorder)

    def _drop_unrecorded_checkpoints(self, recorded: Checkpoint | None) -> None:
        """Delete checkpoints ahead of the rows: the numbers of their steps were lost with the last driver.

        Training those steps again gives the same numbers, and leaves no hole in the curve.
        """
        folder = f"{run_key(self._run.job_id)}/checkpoints"
        for name in self._storage.list_names(folder):
            if recorded is None or int(name.removeprefix("step-")) > recorded.step:
                self._storage.delete(f"{folder}/{name}")

    def _settle(self, reason: str, *, lacks_memory: bool) -> None:
        if self.recorder.over.is_set() or self.recorder.lost.is_set():
            return
        try:
            self.recorder.crashed(reason, self._settings.max_attempts, lacks_memory=lacks_memory)
        except RunLost:
            log.warning("run %s was ended by the orchestrator", self._run.id)

    @contextmanager
    def _heartbeats(self) -> Iterator[None]:
        """Heartbeats from a side thread: a step or a hash of gigabytes may take longer than the timeout."""
        done = threading.Event()
        thread = threading.Thread(target=self._beat, args=(done,), name=f"heartbeat-{self._run.id}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _beat(self, done: threading.Event) -> None:
        while not done.is_set() and not self.recorder.over.is_set():
            try:
                self.recorder.heartbeat()
            except RunLost:
                return
            except Exception:  # thread edge: a database that is away for a moment must not end the run
                log.exception("heartbeat of run %s", self._run.id)
            done.wait(HEARTBEAT_S)


def last_line(error: BaseException) -> str:
    """What a user may read of an error: its last line, without a traceback, secrets or endless detail."""
    lines = [line.strip() for line in redact(str(error)).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
