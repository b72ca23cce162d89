"""The identity of this Tunesmith and its default project."""

from __future__ import annotations

import secrets

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.store.database import now
from service.store.tables import Instance, Project

DEFAULT_PROJECT = "proj-default"


def get_or_create(tx: Session) -> str:
    """The instance id; made with the default project at first start."""
    row = tx.scalar(select(Instance))
    if row is None:
        row = Instance(id=secrets.token_hex(4), created_at=now())
        tx.add_all([row, Project(id=DEFAULT_PROJECT, name="default", created_at=now())])
        tx.flush()
    return row.id
