"""A migrated database and an empty storage per test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from service.store import instance
from service.store.database import Database
from tests.database import migrated
from training.storage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = migrated(f"sqlite:///{tmp_path / 'test.db'}")
    with database.write() as tx:
        instance.get_or_create(tx)
    yield database
    database.close()
