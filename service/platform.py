"""What request handlers need, built once per process and passed down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.settings import Settings
from service.store.database import Database
from training.storage import Storage

if TYPE_CHECKING:
    from service.metrics import Metrics
    from service.serving.catalog import Catalog
    from service.serving.engines import EngineClient


@dataclass(frozen=True)
class Platform:
    """The parts of one process."""

    settings: Settings
    instance_id: str
    db: Database
    storage: Storage
    catalog: Catalog
    engines: EngineClient
    metrics: Metrics
