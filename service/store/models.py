"""The registry of fine-tuned models: immutable rows, never reused ids."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from service.errors import InvalidRequest, NotFound
from service.store import aliases, catalog
from service.store.database import now
from service.store.tables import Job, Model


def in_project(project_id: str) -> list[ColumnElement[bool]]:
    """Conditions of the model list of a project."""
    return [Model.project_id == project_id, Model.deleted_at.is_(None)]


def create(tx: Session, **fields: Any) -> Model:
    """Make a finished artifact servable."""
    model = Model(created_at=now(), **fields)
    tx.add(model)
    catalog.bump(tx)
    return model


def find(tx: Session, project_id: str, model_id: str) -> Model | None:
    """The project's live model with this id."""
    return tx.scalar(select(Model).where(Model.id == model_id, *in_project(project_id)))


def get(tx: Session, project_id: str, model_id: str) -> Model:
    """The project's live model; NotFound in OpenAI's words."""
    model = find(tx, project_id, model_id)
    if model is None:
        raise NotFound(
            f"The model '{model_id}' does not exist or you do not have access to it.",
            param="model",
            code="model_not_found",
        )
    return model


def hold(tx: Session, project_id: str, model_id: str) -> Model:
    """The project's model, which nobody deletes before this transaction has ended; for a job that starts from it."""
    tx.execute(select(Model.seq).where(Model.id == model_id).with_for_update(read=True))
    return get(tx, project_id, model_id)


def by_id(tx: Session, model_id: str) -> Model | None:
    """Any model, deleted or not, of any project; for workers."""
    return tx.scalar(select(Model).where(Model.id == model_id))


def all_live(tx: Session) -> list[Model]:
    """Every live model of every project, oldest first; for the fleet."""
    return list(tx.scalars(select(Model).where(Model.deleted_at.is_(None)).order_by(Model.seq)))


def delete(tx: Session, project_id: str, model_id: str) -> Model:
    """Remove a model from service. One that an alias points to or an open job starts from is refused."""
    tx.execute(select(Model.seq).where(Model.id == model_id).with_for_update())  # waits for jobs being created on it
    model = get(tx, project_id, model_id)
    for revision, targets in aliases.all_current(tx, project_id):
        if any(target.model_id == model_id for target in targets):
            raise InvalidRequest(
                f"The alias '{revision.name}' points to this model; move or delete the alias first.", param="model"
            )
    job_id = tx.scalar(select(Job.id).where(Job.parent_model_id == model_id, Job.finished_at.is_(None)).limit(1))
    if job_id is not None:
        raise InvalidRequest(f"The job '{job_id}' starts from this model; cancel that first.", param="model")
    return mark_deleted(tx, model)


def mark_deleted(tx: Session, model: Model) -> Model:
    """Take a model out of the catalog; its bytes go later, by a task."""
    model.deleted_at = now()
    catalog.bump(tx)
    return model
