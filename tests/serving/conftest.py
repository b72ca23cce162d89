"""One world per file; tests that add to it use ids of their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from service.serving.catalog import Catalog
from service.settings import Settings
from service.store.database import Database
from tests.serving.world import add_base, new_world
from training.storage import Storage

BASE = "tiny"


@dataclass(frozen=True)
class World:
    """What a process would hold."""

    settings: Settings
    db: Database
    storage: Storage
    instance_id: str
    catalog: Catalog


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A fresh database and storage with one ready base."""
    home = tmp_path_factory.mktemp("home")
    settings, db, storage, instance_id = new_world(home, max_batch_size=2, max_waiting=1, echo_token_interval_ms=20.0)
    add_base(db, storage, BASE)
    yield World(settings, db, storage, instance_id, Catalog(db))
    db.close()
