"""Every architecture of the fast path: greedy text equals `generate` while prompts share beginnings, sequences with and
without adapters share steps, and the cache is too small for all of them."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from service.engine.native import kv_cache
from service.engine.native.engine import NativeEngine
from service.engine.native.flat_runner import FLAT_MODEL_TYPES, FlatRunner
from service.engine.protocol import AdapterRef
from tests.engine.lora import merged, save_adapter
from tests.engine.models import CONFIGS, FLAT, load_model
from tests.engine.running import running
from tests.engine.test_greedy import Ids, assert_greedy, chosen


def test_each_type_of_the_fast_path_is_tried_here() -> None:
    assert {CONFIGS[kind].model_type for kind in FLAT} == FLAT_MODEL_TYPES


@pytest.mark.parametrize("kind", FLAT)
async def test_mixed_company_in_a_small_cache(
    kind: str, model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "SHORTEST", 32)
    folder, draw = model_folders[kind], random.Random(kind)
    adapters: dict[str, AdapterRef | None] = {"": None}
    for number, name in enumerate(("a", "b")):
        path = save_adapter(load_model(folder), tmp_path / name, seed=number, rank=3 + number)
        adapters[name] = AdapterRef(name, path)
    beginning = tuple(draw.randrange(256) for _ in range(40))
    requests = [
        (name, beginning[: draw.choice((0, 35, 40))] + tuple(draw.randrange(256) for _ in range(draw.randint(1, 30))))
        for name in ("", "a", "b", "", "a", "b", "a", "")
    ]
    engine = NativeEngine(folder, tokenizer=Ids(), dtype="fp32", max_batch_size=7, max_cache_tokens=300)  # type: ignore[arg-type]
    async with running(engine):
        stepper = engine._stepper
        assert stepper is not None
        runner = stepper.runner
        assert isinstance(runner, FlatRunner)
        answers = await asyncio.gather(*(chosen(engine, prompt, 25, adapters[name]) for name, prompt in requests))
        assert runner.cache.num_held == 0
        assert runner.prefixes.num_tokens > 0
        assert stepper._scheduler.num_preempted > 0
    models = {
        name: merged(load_model(folder), ref.folder) if ref else load_model(folder) for name, ref in adapters.items()
    }
    for (name, prompt), got in zip(requests, answers, strict=True):
        assert_greedy(models[name], prompt, got)
