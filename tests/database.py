"""Databases for tests: of SQLite migrated once, then copied; of PostgreSQL where a server is named."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from service.store import migrate
from service.store.database import Database

POSTGRES = os.environ.get("TEST_POSTGRES_URL", "")  # a URL whose user may create databases


def migrated(url: str) -> Database:
    """The database of a URL with this version's schema. A new SQLite file starts as a copy of one that was migrated."""
    db = Database(url)
    if db.is_sqlite and not (file := Path(db.url.database or "")).exists():
        file.write_bytes(_schema())
    else:
        migrate.upgrade(db)
    return db


@contextmanager
def empty_postgres() -> Iterator[str]:
    """The URL of an empty database on the server that the environment names; skips the test where it names none."""
    if not POSTGRES:
        pytest.skip("TEST_POSTGRES_URL is not set")
    name = f"tunesmith_{secrets.token_hex(4)}"
    admin = create_engine(POSTGRES, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    try:
        yield make_url(POSTGRES).set(database=name).render_as_string(hide_password=False)
    finally:
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        admin.dispose()


@cache
def _schema() -> bytes:
    """A SQLite file without rows."""
    with tempfile.TemporaryDirectory() as folder:
        db = Database(f"sqlite:///{folder}/empty.db")
        migrate.upgrade(db)
        db.close()
        return Path(folder, "empty.db").read_bytes()
