"""Databases for tests: migrated once, then copied."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from service.store import migrate
from service.store.database import Database


def migrated(url: str) -> Database:
    """The database of a URL with this version's schema. A new SQLite file starts as a copy of one that was migrated."""
    db = Database(url)
    if db.is_sqlite and not (file := Path(db.url.database or "")).exists():
        file.write_bytes(_schema())
    else:
        migrate.upgrade(db)
    return db


@cache
def _schema() -> bytes:
    """A SQLite file without rows."""
    with tempfile.TemporaryDirectory() as folder:
        db = Database(f"sqlite:///{folder}/empty.db")
        migrate.upgrade(db)
        db.close()
        return Path(folder, "empty.db").read_bytes()
