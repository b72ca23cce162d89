"""From our rows to a tracker, on a thread of its own: a tracker can neither slow nor fail a run.

A feed reads the numbers from the database, as anybody may, so nothing waits for it and nothing is queued for it.
What a tracker could not take is still there when it answers again, and a new attempt sends what the last one's end cut
off.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence

from sqlalchemy.exc import OperationalError

from service.logs import job_id, redact
from service.store import events, jobs, metrics
from service.store.database import Database
from service.store.tables import Metric, Run
from service.trackers.tracker import Tracker

log = logging.getLogger(__name__)

POLL_S = 2.0
RETRY_S = 30.0  # after a failure
FLUSH_S = 20.0  # how long a finished run's driver waits for the trackers' last numbers
ROWS_AT_A_TIME = 100  # MLflow takes 1000 values in a request
BEFORE_ALL = -1  # step 0 may have an evaluation


class Feed:
    """Keeps one tracker up to date with one attempt. Starts at once, ends by `end` and `join`."""

    def __init__(self, db: Database, tracker: Tracker, run: Run, resumed_step: int) -> None:
        """Of steps after `resumed_step` only this run's numbers count: it trains them again."""
        self._db, self._tracker, self._run, self._resumed_step = db, tracker, run, resumed_step
        self._is_open = False
        self._after: dict[str, int] = {}  # by kind of row: the last step of this run that was sent
        self._over = threading.Event()
        self._is_abandoned = False
        self._thread = threading.Thread(target=self._follow, name=f"{tracker.key}-{run.id}", daemon=True)
        self._thread.start()

    def end(self, *, abandon: bool = False) -> None:
        """The run is over, and its ending stored: send what is left, and how it ended. `abandon` if another run may
        be at work already."""
        self._is_abandoned = abandon
        self._over.set()

    def join(self, timeout_s: float) -> None:
        """Wait for `end` to be done; a tracker that takes longer is left alone."""
        self._thread.join(timeout_s)
        if self._thread.is_alive() and not self._is_abandoned:
            self._warn(TimeoutError(f"it did not take the last numbers within {FLUSH_S:g} s"))

    def _follow(self) -> None:
        job_id.set(self._run.job_id)
        pause_s = 0.0
        while not self._over.wait(pause_s):
            pause_s = POLL_S if self._catch_up() else RETRY_S
        if not self._is_abandoned:
            self._catch_up(is_last=True)

    def _catch_up(self, *, is_last: bool = False) -> bool:
        """Whether the tracker has everything now. After a failure it is opened anew, and gets everything again."""
        try:
            if not self._is_open:
                self._open()
            for rows in self._next_rows():
                self._tracker.log(rows)
            if is_last:
                with self._db.read() as tx:
                    job = jobs.by_id(tx, self._run.job_id)
                self._tracker.close(job)
            return True
        except OperationalError:
            log.warning("the database did not answer; %s gets its numbers later", self._tracker.name)
        except Exception as error:  # thread edge: whatever a tracker does, the run goes on
            self._is_open = False
            self._warn(error)
        return False

    def _open(self) -> None:
        with self._db.read() as tx:
            job = jobs.by_id(tx, self._run.job_id)
            earlier = [row for row in metrics.merged(tx, job.id) if row.step <= self._resumed_step]
        url = self._tracker.open(job)
        for start in range(0, len(earlier), ROWS_AT_A_TIME):
            self._tracker.log(earlier[start : start + ROWS_AT_A_TIME])
        self._after = {"step": BEFORE_ALL, "eval": BEFORE_ALL}
        self._is_open = True
        if url is not None:
            self._say(f"{self._tracker.name} run: {url}", level="info")

    def _next_rows(self) -> Iterator[Sequence[Metric]]:
        """What is new; a row counts as sent once the next batch is asked for."""
        while True:
            with self._db.read() as tx:
                rows = metrics.of_attempt(tx, self._run.job_id, self._run.attempt, self._after, ROWS_AT_A_TIME)
            if not rows:
                return
            yield rows
            self._after |= {row.kind: row.step for row in rows}

    def _warn(self, error: Exception) -> None:
        reason = redact(" ".join(str(error).split()) or type(error).__name__)[:300]
        log.warning("%s failed: %s", self._tracker.name, reason)
        self._say(f"{self._tracker.name} could not be reached: {reason}. The job does not depend on it.", level="warn")

    def _say(self, text: str, *, level: str) -> None:
        """Once per job and level, however many attempts and failures there are."""
        try:
            with self._db.write() as tx:
                job = jobs.by_id(tx, self._run.job_id)
                events.add(tx, job, text, level=level, dedup_key=f"{job.id}:{self._tracker.key}:{level}")
        except OperationalError:
            log.warning("the database did not answer; this event is lost: %s", text)


def end_all(feeds: Sequence[Feed], *, abandon: bool) -> None:
    """End them at the same time, and wait for the slowest, but not for long."""
    for feed in feeds:
        feed.end(abandon=abandon)
    deadline = time.monotonic() + FLUSH_S
    for feed in feeds:
        feed.join(0.0 if abandon else max(0.0, deadline - time.monotonic()))
