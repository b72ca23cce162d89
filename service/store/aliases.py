"""Names that move: each change is a new revision with its targets, written in one transaction."""

from __future__ import annotations

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.errors import NotFound
from service.store import catalog
from service.store.database import new_id, now
from service.store.tables import AliasRevision, AliasTarget

Current = tuple[AliasRevision, list[AliasTarget]]


def put(tx: Session, *, project_id: str, name: str, model_id: str, created_by: str | None) -> AliasRevision:
    """Point the alias to one model. Every request accepted after the commit sees it."""
    revision = _add_revision(tx, project_id, name, created_by)
    tx.add(AliasTarget(revision_id=revision.id, model_id=model_id, weight=1.0, role="live"))
    tx.flush()
    return revision


def delete(tx: Session, project_id: str, name: str, created_by: str | None) -> None:
    """End an alias by a revision without targets; its history stays."""
    get(tx, project_id, name)
    _add_revision(tx, project_id, name, created_by)


def _add_revision(tx: Session, project_id: str, name: str, created_by: str | None) -> AliasRevision:
    catalog.bump(tx)  # first: it takes the row lock that orders two writers of one alias
    last = tx.scalar(
        select(func.max(AliasRevision.revision)).where(
            AliasRevision.project_id == project_id, AliasRevision.name == name
        )
    )
    revision = AliasRevision(
        id=new_id("alias-"),
        created_at=now(),
        project_id=project_id,
        created_by=created_by,
        name=name,
        revision=(last or 0) + 1,
    )
    tx.add(revision)
    tx.flush()
    return revision


def current(tx: Session, project_id: str, name: str) -> Current | None:
    """The alias as it stands; None if it does not exist or was deleted."""
    revision = tx.scalar(
        select(AliasRevision)
        .where(AliasRevision.project_id == project_id, AliasRevision.name == name)
        .order_by(AliasRevision.revision.desc())
        .limit(1)
    )
    if revision is None:
        return None
    targets = list(tx.scalars(select(AliasTarget).where(AliasTarget.revision_id == revision.id)))
    return (revision, targets) if targets else None


def get(tx: Session, project_id: str, name: str) -> Current:
    """The alias as it stands; NotFound if there is none."""
    found = current(tx, project_id, name)
    if found is None:
        raise NotFound(f"The alias '{name}' does not exist.", param="name")
    return found


def all_current(tx: Session, project_id: str) -> list[Current]:
    """Every live alias of a project, by name."""
    names = tx.scalars(select(AliasRevision.name).where(AliasRevision.project_id == project_id).distinct())
    found = (current(tx, project_id, name) for name in sorted(names))
    return [alias for alias in found if alias is not None]


def history(tx: Session, project_id: str, name: str, limit: int) -> list[Current]:
    """The newest revisions of an alias, each with its targets."""
    revisions = tx.scalars(
        select(AliasRevision)
        .where(AliasRevision.project_id == project_id, AliasRevision.name == name)
        .order_by(AliasRevision.revision.desc())
        .limit(limit)
    )
    return [(row, list(tx.scalars(select(AliasTarget).where(AliasTarget.revision_id == row.id)))) for row in revisions]
