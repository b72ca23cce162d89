"""Whatever joins, leaves and is broken off meanwhile: every answer is the one that its model gives alone."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import pytest

from service.engine.native.engine import NativeEngine
from service.engine.protocol import AdapterRef, GenerateRequest
from tests.engine.lora import merged, save_adapter
from tests.engine.models import load_model
from tests.engine.running import AnyEngine, ask, collect, running
from tests.engine.test_greedy import Ids, assert_greedy

pytestmark = pytest.mark.long

NUM_REQUESTS = 40
CONTEXT = 128


def draw_request(rng: random.Random, adapters: dict[str, AdapterRef | None]) -> GenerateRequest:
    """Any prompt, length, number of choices and adapter that fit the context."""
    prompt = tuple(rng.randrange(256) for _ in range(rng.randint(1, 100)))
    adapter = adapters[rng.choice(list(adapters))]
    return ask(prompt, rng.randint(1, CONTEXT - len(prompt)), n=rng.choice((1, 1, 2, 4)), adapter=adapter)


async def break_off(engine: AnyEngine, request: GenerateRequest, after: int) -> None:
    """Read a few steps and leave."""
    async with aclosing(cast(Any, engine.generate(request))) as steps:
        async for _ in steps:
            after -= 1
            if after <= 0:
                return


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["llama", "mistral-window", "gpt2", "gpt-neo-window"])
async def test_answers_do_not_depend_on_the_company(
    kind: str, seed: int, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    rng, folder = random.Random(seed), model_folders[kind]
    adapters: dict[str, AdapterRef | None] = {"": None}
    for number, name in enumerate(("a", "b", "c")):
        path = save_adapter(load_model(folder), tmp_path / name, seed=number, rank=2 + number)
        adapters[name] = AdapterRef(name, path)
    models = {
        name: merged(load_model(folder), ref.folder) if ref else load_model(folder) for name, ref in adapters.items()
    }
    engine = NativeEngine(folder, tokenizer=Ids(), dtype="fp32", max_batch_size=7, max_resident_adapters=2)
    async with running(engine):

        async def one(request: GenerateRequest, leaves_after: int | None) -> None:
            if leaves_after is not None:
                await break_off(engine, request, leaves_after)
                return
            for answer in await collect(engine, request):
                name = request.adapter.id if request.adapter else ""
                assert_greedy(models[name], request.prompt_token_ids, [int(word) for word in answer.text.split()])

        requests = [draw_request(rng, adapters) for _ in range(NUM_REQUESTS)]
        await asyncio.gather(*(one(request, rng.randint(0, 6) if rng.random() < 0.3 else None) for request in requests))
        stats = engine.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
