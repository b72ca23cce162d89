"""Uploaded and produced files. The row is the commit: bytes without a row do not count."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from service.errors import InvalidRequest, NotFound
from service.store import jobs
from service.store.database import now
from service.store.tables import File


def create(
    tx: Session,
    *,
    project_id: str,
    created_by: str | None,
    id: str,
    filename: str,
    purpose: str,
    size_bytes: int,
    sha256: str,
    storage_key: str,
    status: str = "uploaded",
    expires_at: float | None = None,
) -> File:
    """Record a file whose bytes are complete in storage."""
    file = File(
        id=id,
        created_at=now(),
        project_id=project_id,
        created_by=created_by,
        filename=filename,
        purpose=purpose,
        size_bytes=size_bytes,
        sha256=sha256,
        storage_key=storage_key,
        status=status,
        expires_at=expires_at,
    )
    tx.add(file)
    tx.flush()
    return file


def in_project(project_id: str, purpose: str | None = None) -> list[ColumnElement[bool]]:
    """Conditions of the file list of a project."""
    where = [File.project_id == project_id, File.deleted_at.is_(None)]
    return where if purpose is None else [*where, File.purpose == purpose]


def get(tx: Session, project_id: str, file_id: str) -> File:
    """The project's file; deleted ones count as absent."""
    file = tx.scalar(select(File).where(File.id == file_id, *in_project(project_id)))
    if file is None:
        raise NotFound(f"No such File object: {file_id}", param="id")
    return file


def hold(tx: Session, project_id: str, file_id: str) -> File:
    """The project's file, which nobody deletes before this transaction has ended; for a job that will need it."""
    tx.execute(select(File.seq).where(File.id == file_id).with_for_update(read=True))
    return get(tx, project_id, file_id)


def by_id(tx: Session, file_id: str) -> File | None:
    """Any file, deleted or not; for workers."""
    return tx.scalar(select(File).where(File.id == file_id))


def set_validated(
    tx: Session, file_id: str, *, status: str, details: str | None, report: dict[str, Any] | None
) -> None:
    """Store the outcome of validation."""
    file = by_id(tx, file_id)
    assert file is not None, file_id
    file.status, file.status_details, file.report = status, details, report


def delete(tx: Session, project_id: str, file_id: str) -> File:
    """Mark a file deleted that no open job needs; its bytes go later, by a task."""
    tx.execute(select(File.seq).where(File.id == file_id).with_for_update())  # waits for jobs being created with it
    file = get(tx, project_id, file_id)
    job = jobs.open_with_file(tx, file_id)
    if job is not None:
        raise InvalidRequest(
            f"The file is used by job {job.id}, which is {job.state}; cancel it or wait until it has finished.",
            param="file_id",
            code="file_in_use",
        )
    file.deleted_at = now()
    return file


def expired(tx: Session, moment: float) -> list[File]:
    """Files whose time is over."""
    return list(tx.scalars(select(File).where(File.expires_at <= moment, File.deleted_at.is_(None))))
