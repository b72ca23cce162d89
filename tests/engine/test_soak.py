"""Ten minutes of 32 clients who hang up at any moment, over more adapters than there is room for."""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest

from service.engine.native import kv_cache
from service.engine.native.engine import NativeEngine
from service.engine.native.flat_runner import FlatRunner
from service.engine.protocol import AdapterRef
from tests.engine.lora import save_adapter
from tests.engine.models import load_model
from tests.engine.running import ask, running
from tests.engine.test_greedy import Ids

DURATION_S, WARMUP_S = 600.0, 120.0
NUM_CLIENTS, NUM_ADAPTERS, NUM_RESIDENT = 32, 24, 8
MAX_GROWTH = 30_000_000  # bytes: less than what a request a second, forgotten, would leave behind


class Client:
    """Asks one thing after the other."""

    def __init__(self, engine: NativeEngine, adapters: list[AdapterRef], seed: int) -> None:
        self.engine, self.adapters, self.draw = engine, adapters, random.Random(seed)
        self.num_whole = self.num_broken_off = 0

    async def work(self, until: float) -> None:
        """Until that time."""
        while time.monotonic() < until:
            await self.ask()

    async def ask(self) -> None:
        """One request, read to its end or broken off."""
        draw = self.draw
        beginning = tuple(range(draw.choice((0, 0, 32, 64))))
        prompt = beginning + tuple(draw.randrange(256) for _ in range(draw.randint(1, 20)))
        adapter = draw.choice([None, *self.adapters])
        num_choices, max_tokens = draw.choice((1, 1, 1, 2)), draw.randint(1, 40)
        break_off_after = draw.choice((None, None, draw.randint(1, 20)))
        request = ask(prompt, max_tokens, n=num_choices, adapter=adapter, temperature=draw.choice((0.0, 1.0)))
        num_steps = num_tokens = num_ends = 0
        async with aclosing(self.engine.generate(request)) as steps:  # type: ignore[type-var]
            async for deltas in steps:
                num_steps += 1
                num_tokens += sum(delta.num_tokens for delta in deltas)
                num_ends += sum(delta.finish_reason is not None for delta in deltas)
                if num_steps == break_off_after:
                    self.num_broken_off += 1
                    return
        assert (num_ends, num_tokens) == (num_choices, num_choices * max_tokens)
        self.num_whole += 1


@pytest.mark.long
async def test_nothing_is_lost_or_left_behind(
    model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "SHORTEST", 32)
    folder = model_folders["llama"]
    adapters = [
        AdapterRef(f"a{i}", save_adapter(load_model(folder), tmp_path / f"a{i}", seed=i, rank=2 + i % 7))
        for i in range(NUM_ADAPTERS)
    ]
    engine = NativeEngine(
        folder,
        tokenizer=Ids(),  # type: ignore[arg-type]
        max_batch_size=NUM_CLIENTS,
        max_resident_adapters=NUM_RESIDENT,
        max_cache_tokens=1500,  # too few for all: some give their place up
        num_threads=1,
    )
    process = psutil.Process()
    async with running(engine):
        clients = [Client(engine, adapters, seed) for seed in range(NUM_CLIENTS)]
        started = time.monotonic()
        work = asyncio.gather(*(client.work(started + DURATION_S) for client in clients))
        await asyncio.wait([work], timeout=WARMUP_S)
        before = process.memory_info().rss
        await work
        growth = process.memory_info().rss - before
        stepper = engine._stepper
        assert stepper is not None
        assert isinstance(stepper.runner, FlatRunner)
        while not stepper.is_idle:  # the last ones who hung up
            await asyncio.sleep(0.01)
        assert stepper.runner.cache.num_held == 0
        assert stepper._scheduler.num_preempted > 0
        stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, len(stats.resident_adapters)) == (0, 0, NUM_RESIDENT)
    assert stats.num_adapter_loads > NUM_ADAPTERS
    assert all(client.num_whole and client.num_broken_off for client in clients)
    assert growth < MAX_GROWTH, f"{growth / 1e6:.0f} MB more after {DURATION_S - WARMUP_S:.0f} seconds"
