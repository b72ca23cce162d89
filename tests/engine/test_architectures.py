"""Every architecture of the fast path: greedy text equals `generate` while prompts share beginnings, sequences with and
without adapters share steps, and the cache is too small for all of them; alone and in a crowd, with and without a
prefix cache."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from service.engine.native import flat_runner, kv_cache
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
    folder, requests = model_folders[kind], mixed_requests(kind)
    adapters = save_adapters(folder, tmp_path)
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
    models = merged_models(folder, adapters)
    for (name, prompt), got in zip(requests, answers, strict=True):
        assert_greedy(models[name], prompt, got)


@pytest.mark.parametrize("kind", FLAT)
async def test_alone_and_in_a_crowd_without_a_prefix_cache(
    kind: str, model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat_runner, "_PREFIX_SHARE", 0)
    folder, adapters = model_folders[kind], save_adapters(model_folders[kind], tmp_path)
    models = merged_models(folder, adapters)
    requests = [(name, tuple(range(start, start + 40))) for start, name in enumerate(("", "a", "b"))]
    for batch_size in (1, 32):
        engine = NativeEngine(folder, tokenizer=Ids(), dtype="fp32", max_batch_size=batch_size)  # type: ignore[arg-type]
        async with running(engine):
            many = requests if batch_size == 1 else requests * 11
            answers = await asyncio.gather(*(chosen(engine, prompt, 7, adapters[name]) for name, prompt in many))
            assert engine._stepper is not None
            assert isinstance(engine._stepper.runner, FlatRunner)
            assert engine._stepper.runner.prefixes.num_tokens == 0
        for name, prompt, got in {(*request, tuple(got)) for request, got in zip(many, answers, strict=True)}:
            assert_greedy(models[name], prompt, list(got))


def mixed_requests(seed: str) -> list[tuple[str, tuple[int, ...]]]:
    """Adapters' names and prompts, of which some begin alike."""
    draw = random.Random(seed)
    beginning = tuple(draw.randrange(256) for _ in range(40))
    return [
        (name, beginning[: draw.choice((0, 35, 40))] + tuple(draw.randrange(256) for _ in range(draw.randint(1, 30))))
        for name in ("", "a", "b", "", "a", "b", "a", "")
    ]


def save_adapters(folder: Path, root: Path) -> dict[str, AdapterRef | None]:
    """Two adapters of different ranks, and none, by name."""
    found: dict[str, AdapterRef | None] = {"": None}
    for number, name in enumerate(("a", "b")):
        found[name] = AdapterRef(name, save_adapter(load_model(folder), root / name, seed=number, rank=3 + number))
    return found


def merged_models(folder: Path, adapters: dict[str, AdapterRef | None]) -> dict[str, Any]:
    """The model as transformers runs it with each of the adapters."""
    return {
        name: merged(load_model(folder), ref.folder) if ref else load_model(folder) for name, ref in adapters.items()
    }
