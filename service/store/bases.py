"""The registry of allowed base models."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from service.errors import InvalidRequest, NotFound
from service.store import catalog
from service.store.database import now
from service.store.tables import BaseModel, Job, Model


def live() -> list[ColumnElement[bool]]:
    """Conditions of the list of bases."""
    return [BaseModel.deleted_at.is_(None)]


def add(
    tx: Session, *, project_id: str, created_by: str | None, id: str, source: str, revision: str | None
) -> BaseModel:
    """Register a base that a task will now import. One that failed before is tried again."""
    base = tx.scalar(select(BaseModel).where(BaseModel.id == id))
    if base is not None and base.deleted_at is None and base.status != "error":
        raise InvalidRequest(f"The base model '{id}' exists already.", param="id")
    if base is None:
        base = BaseModel(id=id, created_at=now(), project_id=project_id, created_by=created_by, capabilities=[])
        tx.add(base)
    base.source, base.revision, base.status, base.status_details, base.deleted_at = (
        source,
        revision,
        "preparing",
        None,
        None,
    )
    tx.flush()
    return base


def find(tx: Session, base_id: str) -> BaseModel | None:
    """The base with this id, in any status."""
    return tx.scalar(select(BaseModel).where(BaseModel.id == base_id, *live()))


def get(tx: Session, base_id: str) -> BaseModel:
    """The base with this id, in any status; NotFound if there is none."""
    base = find(tx, base_id)
    if base is None:
        raise NotFound(f"The base model '{base_id}' does not exist.", param="model", code="model_not_found")
    return base


def is_preparing(tx: Session, base: BaseModel) -> bool:
    """Whether the base still waits for this very import: it may have been deleted and added from elsewhere since."""
    row = find(tx, base.id)
    if row is None:
        return False
    return (row.status, row.source, row.revision) == ("preparing", base.source, base.revision)


def all_ready(tx: Session) -> list[BaseModel]:
    """Every base that can be trained and served."""
    return list(tx.scalars(select(BaseModel).where(BaseModel.status == "ready", *live()).order_by(BaseModel.seq)))


def set_ready(tx: Session, base_id: str, **fields: Any) -> None:
    """Store what the import found out; the base can be used from now on."""
    base = get(tx, base_id)
    for name, value in fields.items():
        setattr(base, name, value)
    base.status, base.status_details = "ready", None
    catalog.bump(tx)


def set_status(tx: Session, base_id: str, status: str, details: str | None) -> None:
    """Say how the import goes, or why it failed."""
    base = get(tx, base_id)
    base.status, base.status_details = status, details


def delete(tx: Session, base_id: str) -> BaseModel:
    """Remove a base that no model and no open job needs."""
    base = get(tx, base_id)
    needed = tx.scalar(select(Model.id).where(Model.base_id == base_id, Model.deleted_at.is_(None)).limit(1))
    if needed:
        raise InvalidRequest(
            f"The base model '{base_id}' is needed by the model '{needed}'; delete that first.", param="id"
        )
    job = tx.scalar(select(Job.id).where(Job.base_id == base_id, Job.finished_at.is_(None)).limit(1))
    if job:
        raise InvalidRequest(f"The base model '{base_id}' is needed by the job '{job}'; cancel that first.", param="id")
    base.deleted_at = now()
    catalog.bump(tx)
    return base
