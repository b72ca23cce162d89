"""Ask a published classifier or embedding model as a gateway would, in this process."""

from __future__ import annotations

import asyncio

from service.serving.catalog import Catalog
from service.serving.engines import InProcessEngines
from service.serving.messages import Encoded, EncodeRequest
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
