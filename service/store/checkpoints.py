"""Resumable states of jobs, each callable as a model."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from service.store.database import new_id, now
from service.store.tables import Checkpoint, Job


def is_recorded(tx: Session, job_id: str, attempt: int, step: int, manifest_hash: str) -> bool:
    """Whether this attempt recorded the step, or the same folder is known from an earlier one."""
    rows = tx.scalars(select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.step == step))
    return any(
        row.attempt == attempt or (row.deleted_at is None and row.manifest_hash == manifest_hash) for row in rows
    )


def add(
    tx: Session,
    job: Job,
    *,
    attempt: int,
    step: int,
    storage_key: str,
    manifest_hash: str,
    model_id: str,
    metrics: dict[str, Any],
) -> Checkpoint:
    """Record a complete checkpoint that is not recorded yet."""
    checkpoint = Checkpoint(
        id=new_id("ftckpt_"),
        created_at=now(),
        project_id=job.project_id,
        created_by=job.created_by,
        job_id=job.id,
        attempt=attempt,
        step=step,
        storage_key=storage_key,
        manifest_hash=manifest_hash,
        model_id=model_id,
        metrics=metrics,
    )
    tx.add(checkpoint)
    tx.flush()
    return checkpoint


def of_job(job_id: str) -> list[ColumnElement[bool]]:
    """Conditions of a job's checkpoint list."""
    return [Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None)]


def live(tx: Session, job_id: str) -> list[Checkpoint]:
    """The job's checkpoints that still exist."""
    return list(tx.scalars(select(Checkpoint).where(*of_job(job_id))))


def latest(tx: Session, job_id: str) -> Checkpoint | None:
    """The furthest live checkpoint."""
    return tx.scalar(
        select(Checkpoint).where(*of_job(job_id)).order_by(Checkpoint.step.desc(), Checkpoint.seq.desc()).limit(1)
    )


def mark_deleted(tx: Session, job_id: str, storage_key: str) -> list[Checkpoint]:
    """Note that a checkpoint's folder is gone, or was written anew; returns the rows that were live."""
    rows = list(tx.scalars(select(Checkpoint).where(Checkpoint.storage_key == storage_key, *of_job(job_id))))
    for row in rows:
        row.deleted_at = now()
    return rows
