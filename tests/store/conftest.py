"""A real migrated database: SQLite always, PostgreSQL where a server is named."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from service.store import instance
from service.store.database import Database
from tests.database import migrated

POSTGRES = os.environ.get("TEST_POSTGRES_URL", "")  # a URL whose user may create databases


@pytest.fixture(params=["sqlite", "postgresql"])
def db_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'store.db'}"
        return
    if not POSTGRES:
        pytest.skip("TEST_POSTGRES_URL is not set")
    name = f"tunesmith_{secrets.token_hex(4)}"
    admin = create_engine(POSTGRES, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    yield make_url(POSTGRES).set(database=name).render_as_string(hide_password=False)
    with admin.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()


@pytest.fixture
def db(db_url: str) -> Iterator[Database]:
    """A database with this version's schema, the instance and the default project."""
    database = migrated(db_url)
    with database.write() as tx:
        instance.get_or_create(tx)
    yield database
    database.close()
