"""What only the native engine promises: adapters' arithmetic and residency, seeds, penalties, failure."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from service.engine.native.engine import NativeEngine
from service.engine.native.sampler import BatchSampler, SamplerState
from service.engine.protocol import AdapterMismatch, AdapterRef, SamplingParams
from tests.engine.lora import merged, save_adapter
from tests.engine.models import byte_tokenizer, load_model
from tests.engine.running import EngineFailed, ask, collect, running
from tests.engine.test_greedy import Ids, assert_greedy

TOKENIZER = byte_tokenizer()
PROMPT = tuple(range(30, 60))


def native(folder: Path, **options: object) -> NativeEngine:
    return NativeEngine(folder, **{"tokenizer": TOKENIZER, "dtype": "fp32", **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt-neo-window"])
async def test_adapters_mixed_in_a_batch_answer_like_merged_weights(
    kind: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = model_folders[kind]
    for name, options in {
        "plain": {"rank": 4},
        "wide": {"rank": 9, "use_rslora": True, "lora_alpha": 3},
        "dora": {"rank": 4, "use_dora": True, "use_rslora": True, "alpha_pattern": {"v_proj": 3}},
        "pattern": {"rank": 3, "rank_pattern": {"k_proj": 5}, "alpha_pattern": {"q_proj": 2, "c_attn": 3}},
        "head": {"rank": 4, "target_modules": ["lm_head", "q_proj"]} if kind == "llama" else {},  # others tie it
    }.items():
        save_adapter(load_model(folder), tmp_path / name, seed=len(name), **options)  # type: ignore[arg-type]
    names = ["plain", None, "wide", "dora", "head", "pattern", "plain", None, "dora", "head", "pattern", "wide", "wide"]
    async with running(native(folder, tokenizer=Ids(), max_batch_size=6)) as engine:

        async def one(number: int, name: str | None) -> tuple[tuple[int, ...], list[int]]:
            prompt = PROMPT[number:]
            adapter = AdapterRef(name, tmp_path / name) if name else None
            (answer,) = await collect(engine, ask(prompt, 10 + number, adapter=adapter))
            return prompt, [int(word) for word in answer.text.split()]

        answers = await asyncio.gather(*(one(number, name) for number, name in enumerate(names)))
    models = {name: merged(load_model(folder), tmp_path / name) if name else load_model(folder) for name in set(names)}
    for name, (prompt, got) in zip(names, answers, strict=True):
        assert_greedy(models[name], prompt, got)


async def test_a_newcomer_that_pushes_rows_beyond_the_buffer_gets_room_first(
    model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Rows of the base lie before those of an adapter, so the fifth sequence moves the fourth's neighbours up."""
    folder = model_folders["llama"]
    adapter = AdapterRef("a", save_adapter(load_model(folder), tmp_path / "a", seed=1))
    async with running(native(folder, tokenizer=Ids())) as engine:
        stream = engine.generate(ask(PROMPT, 90, n=4, adapter=adapter))
        texts = ["", "", "", ""]
        for deltas in [await anext(stream), await anext(stream)]:  # now all four have rows
            for delta in deltas:
                texts[delta.index] += delta.text
        (newcomer,) = await collect(engine, ask(PROMPT, 10))
        async for deltas in stream:
            for delta in deltas:
                texts[delta.index] += delta.text
    assert_greedy(load_model(folder), PROMPT, [int(word) for word in newcomer.text.split()])
    for text in texts:
        assert_greedy(merged(load_model(folder), adapter.folder), PROMPT, [int(word) for word in text.split()])


async def test_an_adapter_in_use_is_never_evicted(model_folders: dict[str, Path], tmp_path: Path) -> None:
    folder = model_folders["llama"]
    refs = [AdapterRef(str(i), save_adapter(load_model(folder), tmp_path / str(i), seed=i)) for i in range(2)]
    async with running(native(folder, max_resident_adapters=1)) as engine:
        stream = engine.generate(ask(PROMPT, 90, adapter=refs[0]))
        await anext(stream)
        other = asyncio.create_task(collect(engine, ask(PROMPT, 3, adapter=refs[1])))
        base = await collect(engine, ask(PROMPT, 3))  # the base model does not wait for adapters
        assert base
        assert engine.stats().resident_adapters == ("0",)
        assert not other.done()
        async for _ in stream:
            pass
        assert len(await other) == 1
        assert engine.stats().resident_adapters == ("1",)


async def test_an_adapter_of_another_base_is_refused_by_name(model_folders: dict[str, Path], tmp_path: Path) -> None:
    async with running(native(model_folders["llama"])) as engine:
        other = save_adapter(load_model(model_folders["gpt2"]), tmp_path / "gpt2", seed=0)
        with pytest.raises(AdapterMismatch, match="no linear layer of this base model"):
            await engine.load_adapter(AdapterRef("gpt2", other))
        for name in ("use_qalora", "use_dora"):  # the one is not run here, the other lacks its magnitudes
            folder = save_adapter(load_model(model_folders["llama"]), tmp_path / name, seed=0)
            config = json.loads((folder / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps({**config, name: True}))
            with pytest.raises(AdapterMismatch, match=name):
                await engine.load_adapter(AdapterRef(name, folder))


async def test_a_seed_fixes_the_answer_and_each_choice_differs(model_folders: dict[str, Path]) -> None:
    async with running(native(model_folders["llama"])) as engine:
        request = ask(PROMPT, 20, n=3, temperature=1.0, top_p=0.9, seed=5)
        noise = [collect(engine, ask(PROMPT[i:], 15, temperature=1.0)) for i in range(4)]
        first, *_ = await asyncio.gather(collect(engine, request), *noise)
        assert first == await collect(engine, request)
        assert len({answer.text for answer in first}) == 3
        unseeded = [await collect(engine, ask(PROMPT, 20, temperature=1.0)) for _ in range(2)]
        assert unseeded[0] != unseeded[1]


def test_draws_depend_on_seed_and_index_only() -> None:
    params = SamplingParams(8, temperature=1.0, seed=3)
    draws = [[SamplerState(params, index).draw() for _ in range(2)] for index in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_samples_follow_the_distribution(top_p: float) -> None:
    weights = torch.tensor([0.1, 0.5, 0.0, 0.15, 0.25])
    states = [SamplerState(SamplingParams(1, temperature=1.0, top_p=top_p, seed=i), 0) for i in range(4000)]
    tokens = BatchSampler(states, torch.device("cpu"))(weights.log().repeat(4000, 1)).token_ids
    kept = weights if top_p == 1 else torch.tensor([0.0, 0.5, 0.0, 0.0, 0.25])
    torch.testing.assert_close(tokens.bincount(minlength=5) / 4000, kept / kept.sum(), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, [1, 4]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"min_p": 0.3}, [1, 3, 4]),  # 0.15 is 0.3 times 0.5
        ({"min_p": 1.0}, [1]),
        ({"top_k": 3, "top_p": 0.6}, [1, 4]),  # of what the three leave, 0.5/0.9 = 0.56 is less than 0.6
        ({"top_k": 2, "top_p": 0.66}, [1]),  # 0.5/0.75 = 0.67 is enough
        ({"min_p": 0.3, "top_p": 0.8}, [1, 4]),
        ({"top_p": 0.0}, [1]),
        ({"logit_bias": ((1, -100.0), (2, 1.0))}, [0, 2, 3, 4]),
    ],
)
def test_filters_and_bias_leave_the_distribution_that_they_say(options: dict[str, Any], kept: list[int]) -> None:
    """Alone in a batch, and beside rows that are filtered in other ways or not at all."""
    weights = torch.tensor([0.07, 0.5, 0.03, 0.15, 0.25])
    num = 3000
    others = [
        SamplerState(SamplingParams(1, **other), 0)
        for other in ({}, {"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 1}, {"min_p": 0.1, "logprobs": 2})
    ]
    expected = weights * torch.tensor([float(i in kept) for i in range(5)])
    if "logit_bias" in options:
        expected[2] *= torch.e
    for beside in ([], others):
        batch = [*(SamplerState(SamplingParams(1, seed=i, **options), 0) for i in range(num)), *beside]
        chosen = BatchSampler(batch, torch.device("cpu"))(weights.log().repeat(len(batch), 1))
        share = chosen.token_ids[:num].bincount(minlength=5) / num
        assert set(share.nonzero().flatten().tolist()) <= set(kept)
        torch.testing.assert_close(share, expected / expected.sum(), atol=0.04, rtol=0)


def test_a_batch_in_which_nobody_asks_has_no_scores_and_one_in_which_some_do_has_theirs() -> None:
    logits = torch.randn(3, 9)
    silent, asking = SamplingParams(1, temperature=0.0), SamplingParams(1, temperature=0.0, logprobs=2)
    none = BatchSampler([SamplerState(silent, 0)] * 3, torch.device("cpu"))(logits.clone())
    assert none.scores() == [None, None, None]
    states = [SamplerState(params, 0) for params in (silent, asking, silent)]
    first, second, third = BatchSampler(states, torch.device("cpu"))(logits.clone()).scores()
    assert first is third is None
    assert second is not None
    assert second.logprob == pytest.approx(float(logits[1].log_softmax(-1).max()))
    assert [token_id for token_id, _ in second.top] == logits[1].topk(2).indices.tolist()


def test_penalties_follow_the_formula_over_generated_tokens() -> None:
    state = SamplerState(SamplingParams(9, temperature=0.0, presence_penalty=1.0, frequency_penalty=0.5), 0)
    sampler = BatchSampler([state], torch.device("cpu"))
    logits = torch.tensor([[5.0, 3.4, 3.0]])
    # 5 -> 3.5 -> 3.0 for token 0; token 1 (3.4) wins next and falls to 1.9; then 0 and 2 tie at 3.0, the first wins
    assert [int(sampler(logits.clone()).token_ids[0]) for _ in range(4)] == [0, 0, 1, 0]


async def test_a_crash_reaches_every_stream_and_is_seen_as_unhealthy(model_folders: dict[str, Path]) -> None:
    engine = native(model_folders["llama"])
    await engine.start()
    streams = [engine.generate(ask(PROMPT, 90)) for _ in range(3)]
    for stream in streams:
        await anext(stream)
    engine._commands.put(None)  # type: ignore[arg-type]
    engine._stepper.runner._model = None  # type: ignore[union-attr]
    for stream in streams:
        with pytest.raises(EngineFailed):
            async for _ in stream:
                pass
    assert not engine.healthy
    with pytest.raises(EngineFailed):
        await collect(engine, ask(PROMPT, 1))
    await engine.stop()


async def test_a_folder_without_a_model_fails_at_start(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        await native(tmp_path).start()
