"""Which queued jobs may start now, and with how many workers: by priority, then age.

A job that does not fit lets later ones pass, for a while. One with a range of workers waits a little for all of them
and then takes what there is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from service.jobs.launchers import Launcher
from service.jobs.states import JobKind
from service.store.tables import Job

PATIENCE_S = 60.0  # how long smaller jobs may pass a bigger one; after that, room is kept free for it
# How long a job with a range waits for room for all its workers once there is room for the fewest. Longer than what was
# just placed is counted twice (launchers.PLACING_S), and than Ray takes to see that a node is gone.
FILL_S = 30.0


def worker_range(job: Job) -> tuple[int, int]:
    """The fewest and the most train workers that the job's own run may have; a sweep's has none, for its trials are
    jobs and bring theirs."""
    if job.kind == JobKind.SWEEP:
        return 0, 0
    most = int(job.spec["num_workers"])
    return int(job.spec.get("min_workers") or most), most


class Queue:
    """First fit without starvation. Remembers since when a job has waited; a restart only forgets patience."""

    def __init__(self, launcher: Launcher, patience_s: float = PATIENCE_S, fill_s: float = FILL_S) -> None:
        self._launcher, self._patience_s, self._fill_s = launcher, patience_s, fill_s
        self._passed_since: dict[str, float] = {}
        self._never_fitting: list[Job] = []
        self._known_never_fitting: set[str] = set()

    def startable(self, queued: list[Job], clock: Callable[[], float] = time.monotonic) -> Iterator[tuple[Job, int]]:
        """Yields jobs in order, each with its number of workers; the caller starts each before it asks for the next, so
        that room is counted right."""
        moment, waiting = clock(), {job.id for job in queued}
        self._passed_since = {id_: since for id_, since in self._passed_since.items() if id_ in waiting}
        self._known_never_fitting &= waiting
        for job in queued:
            least, most = worker_range(job)
            num_free = self._launcher.num_free()
            if num_free < most:
                num_slots = self._launcher.num_slots()
                if num_slots < least:
                    self._note_never_fitting(job)  # it holds up nobody: the cluster may grow, or its owner cancels it
                    continue
                most = min(most, num_slots)  # no use to wait for more
            waited_s = 0.0 if num_free >= most else moment - self._passed_since.setdefault(job.id, moment)
            if num_free >= most or (num_free >= least and waited_s >= self._fill_s):
                self._passed_since.pop(job.id, None)
                yield job, min(most, num_free)
            elif num_free >= least or waited_s >= self._patience_s:
                return

    def take_never_fitting(self) -> list[Job]:
        """Jobs found since the last call that ask for more than the whole cluster; each is named once."""
        found, self._never_fitting = self._never_fitting, []
        return found

    def _note_never_fitting(self, job: Job) -> None:
        if job.id not in self._known_never_fitting:
            self._known_never_fitting.add(job.id)
            self._never_fitting.append(job)
