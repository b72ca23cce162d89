"""/v1/fine_tuning/jobs: wishes go to the database, where the orchestrator finds them. Nothing here waits for a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.responses import StreamingResponse
from sqlalchemy.orm import Session

from service.api.create_job import Attempt, create_job
from service.api.deps import JobsDep, PlatformDep, no_body
from service.api.follow import SSE_HEADERS, Follower
from service.api.paging import After, Limit, list_page, refuse_unknown_query
from service.api.schemas import CreateJob
from service.api.views import checkpoint_json, event_json, job_json
from service.auth import Caller
from service.errors import InvalidRequest, Unavailable
from service.platform import Platform
from service.store import checkpoints, events, jobs
from service.store.paging import Page, page
from service.store.tables import Checkpoint, Event, Job

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])

MAX_WISH_ATTEMPTS = 5

RetryCount = Annotated[str | None, Header(alias="x-stainless-retry-count")]
IdempotencyKey = Annotated[str | None, Header(alias="idempotency-key", max_length=256)]
JobId = Annotated[str | None, Query(min_length=1, max_length=256)]
LastEventId = Annotated[str | None, Header(alias="last-event-id", max_length=256)]


@router.post("")
def create(
    body: CreateJob,
    request: Request,
    platform: PlatformDep,
    who: JobsDep,
    retry_count: RetryCount = None,
    idempotency_key: IdempotencyKey = None,
) -> dict[str, Any]:
    """Queue a job. A retry by the client (its retry count, or an Idempotency-Key) answers with the first one's job."""
    is_number = retry_count is not None and re.fullmatch(r"[0-9]{1,9}", retry_count) is not None
    attempt = Attempt(int(retry_count or 0) if is_number else 0, idempotency_key or "", request.state.received_at)
    with platform.db.write() as tx:
        job = create_job(tx, platform, who, body, attempt)
        trials = jobs.trials(tx, job)  # a retried create may come late
    return job_json(job, platform.settings.organization, trials)


@router.get("")
def list_jobs(
    request: Request,
    platform: PlatformDep,
    who: JobsDep,
    after: After = None,
    limit: Limit = 20,
    parent: JobId = None,
) -> dict[str, Any]:
    """Jobs of the project, newest first; `metadata[name]=value` filters, `metadata=null` finds those without any.

    The trials of sweeps are left out; `parent=` a sweep's id lists that sweep's.
    """
    refuse_unknown_query(request, "after", "limit", "metadata", "metadata[", "parent")
    where = [*jobs.in_project(who.project_id, _metadata_filter(request)), jobs.of_parent(parent)]
    if "metadata" in request.query_params:
        if request.query_params["metadata"] != "null":
            raise InvalidRequest("Use 'metadata[name]=value', or 'metadata=null'.", param="metadata")
        where.append(jobs.without_metadata())
    with platform.db.read() as tx:
        if parent is not None:
            jobs.get(tx, who.project_id, parent)
        rows, has_more = page(tx, Job, Page(after, limit), *where)
        trials = jobs.trials(tx, *rows)
    return list_page([job_json(job, platform.settings.organization, trials) for job in rows], has_more)


def _metadata_filter(request: Request) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if not name.startswith("metadata["):
            continue
        key = name.removeprefix("metadata[").removesuffix("]")
        # Quotes and backslashes mean something in the databases' JSON paths.
        if not name.endswith("]") or not key or set(key) & {'"', "\\"} or pairs.get(key, value) != value:
            raise InvalidRequest(f"'{name}' cannot be filtered by; use 'metadata[name]=value'.", param="metadata")
        pairs[key] = value
    return pairs


@router.get("/{job_id}")
def retrieve(job_id: str, platform: PlatformDep, who: JobsDep) -> dict[str, Any]:
    """One job."""
    with platform.db.read() as tx:
        job = jobs.get(tx, who.project_id, job_id)
        trials = jobs.trials(tx, job)
    return job_json(job, platform.settings.organization, trials)


@router.post("/{job_id}/cancel", dependencies=[Depends(no_body)])
def cancel(job_id: str, platform: PlatformDep, who: JobsDep) -> dict[str, Any]:
    """Cancel at once without a live run, otherwise after the current step."""
    return _wish(platform, who, job_id, jobs.request_cancel)


@router.post("/{job_id}/pause", dependencies=[Depends(no_body)])
def pause(job_id: str, platform: PlatformDep, who: JobsDep) -> dict[str, Any]:
    """Pause at once without a live run, otherwise after a checkpoint of the current step."""
    return _wish(platform, who, job_id, jobs.request_pause)


@router.post("/{job_id}/resume", dependencies=[Depends(no_body)])
def resume(job_id: str, platform: PlatformDep, who: JobsDep) -> dict[str, Any]:
    """Let a paused job go on."""
    return _wish(platform, who, job_id, jobs.request_resume)


def _wish(platform: Platform, who: Caller, job_id: str, wish: Callable[[Session, str, str], Job]) -> dict[str, Any]:
    """Write a wish down; tried again when the job's state moved in between, which only PostgreSQL lets happen."""
    for _ in range(MAX_WISH_ATTEMPTS):
        try:
            with platform.db.write() as tx:
                job = wish(tx, who.project_id, job_id)
                trials = jobs.trials(tx, job)
        except jobs.StateConflict:
            continue
        return job_json(job, platform.settings.organization, trials)
    raise Unavailable("The job is changing its state right now; try again.", retry_after_s=1.0)


@router.get("/{job_id}/events", response_model=None)
def list_events(
    job_id: str,
    request: Request,
    platform: PlatformDep,
    who: JobsDep,
    after: After = None,
    limit: Limit = 20,
    stream: Annotated[bool, Query()] = False,
    last_event_id: LastEventId = None,
) -> dict[str, Any] | StreamingResponse:
    """Events, newest first; with `stream=true` all from the oldest (or behind `after`) on, and then as they happen."""
    refuse_unknown_query(request, "after", "limit", "stream")
    if stream:
        if "limit" in request.query_params:
            raise InvalidRequest("A stream of events has no 'limit'; close it when you have enough.", param="limit")
        # A browser that comes back sends the same URL, and in the header how far it has got since.
        follower = Follower(platform.db, who.project_id, job_id, last_event_id or after)
        return StreamingResponse(follower.frames(), media_type="text/event-stream", headers=SSE_HEADERS)
    with platform.db.read() as tx:
        jobs.get(tx, who.project_id, job_id)
        own = events.of_job(job_id)
        rows, has_more = page(tx, Event, Page(after, limit), *own, cursor_in=own)
    return list_page([event_json(event) for event in rows], has_more)


@router.get("/{job_id}/checkpoints")
def list_checkpoints(
    job_id: str, request: Request, platform: PlatformDep, who: JobsDep, after: After = None, limit: Limit = 10
) -> dict[str, Any]:
    """Checkpoints that still exist, newest first."""
    refuse_unknown_query(request, "after", "limit")
    with platform.db.read() as tx:
        jobs.get(tx, who.project_id, job_id)
        rows, has_more = page(tx, Checkpoint, Page(after, limit), *checkpoints.of_job(job_id))
    return list_page([checkpoint_json(checkpoint) for checkpoint in rows], has_more)
