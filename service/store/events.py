"""The event list of each job."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from service.store.database import new_id, now
from service.store.tables import Event, Job


def add(
    tx: Session,
    job: Job,
    message: str,
    *,
    level: str = "info",
    type: str = "message",
    data: dict[str, Any] | None = None,
    dedup_key: str | None = None,
    at: float | None = None,
) -> None:
    """Append an event; a second one with the same `dedup_key` is a no-op."""
    event_id = new_id("ftevent-")
    if dedup_key is not None and tx.scalar(select(Event.seq).where(Event.dedup_key == dedup_key)) is not None:
        return
    tx.add(
        Event(
            id=event_id,
            created_at=at or now(),
            project_id=job.project_id,
            created_by=job.created_by,
            job_id=job.id,
            level=level,
            type=type,
            message=message,
            data=data,
            dedup_key=dedup_key or event_id,
        )
    )
    tx.flush()


def of_job(job_id: str) -> list[ColumnElement[bool]]:
    """Conditions of a job's event list."""
    return [Event.job_id == job_id]


def after_seq(tx: Session, job_id: str, seq: int, limit: int = 500) -> list[Event]:
    """The job's events behind `seq`, oldest first; for following live."""
    return list(
        tx.scalars(select(Event).where(Event.job_id == job_id, Event.seq > seq).order_by(Event.seq).limit(limit))
    )
