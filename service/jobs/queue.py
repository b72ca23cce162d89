"""Which queued jobs may start now: by priority, then age; a job that does not fit lets later ones pass, for a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from service.jobs.launchers import Launcher, num_workers_of
from service.store.tables import Job

PATIENCE_S = 60.0  # how long smaller jobs may pass a bigger one; after that, room is kept free for it


class Queue:
    """First fit without starvation. Remembers since when a job has been passed; a restart only forgets patience."""

    def __init__(self, launcher: Launcher, patience_s: float = PATIENCE_S) -> None:
        self._launcher, self._patience_s = launcher, patience_s
        self._passed_since: dict[str, float] = {}
        self._never_fitting: list[Job] = []
        self._known_never_fitting: set[str] = set()

    def startable(self, queued: list[Job], clock: Callable[[], float] = time.monotonic) -> Iterator[Job]:
        """Yields jobs in order; the caller starts each before it asks for the next, so that room is counted right."""
        moment, waiting = clock(), {job.id for job in queued}
        self._passed_since = {id_: since for id_, since in self._passed_since.items() if id_ in waiting}
        self._known_never_fitting &= waiting
        for job in queued:
            num_workers = num_workers_of(job)
            if self._launcher.fits(num_workers):
                self._passed_since.pop(job.id, None)
                yield job
            elif not self._launcher.ever_fits(num_workers):
                self._note_never_fitting(job)  # it holds up nobody: the cluster may grow, or its owner cancels it
            elif moment - self._passed_since.setdefault(job.id, moment) >= self._patience_s:
                return

    def take_never_fitting(self) -> list[Job]:
        """Jobs found since the last call that ask for more than the whole cluster; each is named once."""
        found, self._never_fitting = self._never_fitting, []
        return found

    def _note_never_fitting(self, job: Job) -> None:
        if job.id not in self._known_never_fitting:
            self._known_never_fitting.add(job.id)
            self._never_fitting.append(job)
