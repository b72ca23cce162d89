"""A job's events as server-sent events: the past first, then what happens, until the job is over."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Final

from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.concurrency import run_in_threadpool

from service.api.errors import to_service_error
from service.api.views import event_json
from service.jobs.states import JobState
from service.store import events, jobs
from service.store.database import Database
from service.store.paging import Page, page
from service.store.tables import Event

POLL_S: Final = 0.2
KEEP_ALIVE_S: Final = 10.0
BATCH: Final = 200
SSE_HEADERS: Final = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Follower:
    """Reads a job's events in order, each once. Polls the database: that works whichever process writes them."""

    def __init__(self, db: Database, project_id: str, job_id: str, after: str | None) -> None:
        """Reads the first batch, so that an unknown job or cursor is an ordinary error and not a broken stream."""
        self._db = db
        self._project_id = project_id
        self._job_id = job_id
        self._after = after
        self._first = self._poll()

    def _poll(self) -> tuple[list[Event], bool]:
        """The next events, and whether they are the last: state and events are read in one snapshot."""
        with self._db.read() as tx:
            job = jobs.get(tx, self._project_id, self._job_id)
            own = events.of_job(self._job_id)
            rows, has_more = page(tx, Event, Page(self._after, BATCH, "asc"), *own, cursor_in=own)
        if rows:
            self._after = rows[-1].id
        return rows, JobState(job.state).is_terminal and not has_more

    async def frames(self) -> AsyncIterator[str]:
        """The stream's text; ends with `[DONE]`. Closing it (the client left) stops the polling."""
        rows, is_over = self._first
        last_sent = asyncio.get_running_loop().time()
        try:
            while True:
                for event in rows:
                    yield f"id: {event.id}\ndata: {json.dumps(event_json(event))}\n\n"
                if is_over:
                    yield "data: [DONE]\n\n"
                    return
                moment = asyncio.get_running_loop().time()
                if rows:
                    last_sent = moment
                elif moment - last_sent >= KEEP_ALIVE_S:
                    last_sent = moment
                    yield ": keep-alive\n\n"
                if len(rows) < BATCH:
                    await asyncio.sleep(POLL_S)
                rows, is_over = await run_in_threadpool(self._poll)
        except (OperationalError, PoolTimeout) as error:  # the answer has begun: say so, the client may come back
            yield f"data: {json.dumps(to_service_error(error).body())}\n\n"
