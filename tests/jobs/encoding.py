"""Import an encoder as the API does, and ask a published model as a gateway would, in this process."""

from __future__ import annotations

import asyncio
from pathlib import Path

from service.serving.catalog import Catalog
from service.serving.engines import InProcessEngines
from service.serving.messages import Encoded, EncodeRequest
from service.store import bases, tasks
from service.store.tables import BaseModel
from tests.jobs.world import PROJECT, World


def encode(world: World, model: str, texts: list[str]) -> Encoded:
    """The rows of the texts, from the model that the name means now."""

    async def ask() -> Encoded:
        engines = InProcessEngines(world.settings, world.storage)
        target = Catalog(world.db).lookup(PROJECT, model)
        try:
            async for output in engines.stream(target, EncodeRequest("one", target, tuple(texts), is_list=True)):
                assert isinstance(output, Encoded)
                return output
        finally:
            await engines.close()
        raise AssertionError("the engine said nothing")

    return asyncio.run(ask())


def import_encoder(world: World, source: Path) -> BaseModel:
    """The ready base that the worker task makes of a folder."""
    with world.db.write() as tx:
        bases.add(tx, project_id=PROJECT, created_by=None, id="encoder", source=str(source), revision=None)
        tasks.add(tx, "import_base", {"base_id": "encoder"})

    def found() -> BaseModel:
        with world.db.read() as tx:
            return bases.get(tx, "encoder")

    world.tick_until(lambda: found().status != "preparing")
    assert found().status == "ready", found().status_details
    return found()
