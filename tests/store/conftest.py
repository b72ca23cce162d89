"""A real migrated database: SQLite always, PostgreSQL where a server is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.store import instance
from service.store.database import Database
from tests.database import empty_postgres, migrated


@pytest.fixture(params=["sqlite", "postgresql"])
def db_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'store.db'}"
        return
    with empty_postgres() as url:
        yield url


@pytest.fixture
def db(db_url: str) -> Iterator[Database]:
    """A database with this version's schema, the instance and the default project."""
    database = migrated(db_url)
    with database.write() as tx:
        instance.get_or_create(tx)
    yield database
    database.close()
