"""What the engine does on a GPU only: pages, FlashAttention over them, and CUDA graphs.

Without a GPU, a plain loop of what torch documents takes the place of FlashAttention's kernel, and calling a step again
on the same tensors that of a graph's replay, so that all around them is tested everywhere.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from service.engine.native import decode_graphs, flat_runner, paged
from service.engine.native.adapters import load_adapter
from service.engine.native.engine import NativeEngine
from service.engine.native.flat_runner import FlatRunner
from service.engine.native.kv_cache import StateShape
from service.engine.native.lora_slots import Slots, seats_of
from service.engine.native.paged import PagedCache
from service.engine.native.runner import Feed, load_runner
from service.engine.protocol import AdapterRef
from tests.engine.lora import save_adapter
from tests.engine.models import FLAT, load_model
from tests.engine.running import running
from tests.engine.test_architectures import merged_models, mixed_requests, save_adapters
from tests.engine.test_greedy import Ids, assert_greedy, chosen


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    num_splits: int | None,
) -> torch.Tensor:
    """As `torch.nn.attention.varlen` says, over pages: queries [tokens, heads, size] are the last ones of each
    sequence, and see `window_size` keys before and behind their own, -1 for all."""
    assert (cu_seq_k.diff() == seqused_k).all()
    assert int(cu_seq_q.diff().max()) <= max_q
    assert int(seqused_k.max()) <= max_k
    assert enable_gqa == (query.shape[1] != key.shape[2])
    assert num_splits == 1 or (max_q == 1 and enable_gqa and window_size == (-1, -1))  # else torch 2.13 is wrong
    out = torch.full_like(query, float("nan"))
    for number, length in enumerate(seqused_k.tolist()):
        tokens = slice(*cu_seq_q[number : number + 2].tolist())
        q = query[tokens].transpose(0, 1)
        k, v = (
            states[block_table[number]].flatten(0, 1)[:length].transpose(0, 1).repeat_interleave(len(q) // of, dim=0)
            for states, of in ((key, key.shape[2]), (value, value.shape[2]))
        )
        distance = torch.arange(length - q.shape[1], length)[:, None] - torch.arange(length)
        before, behind = (limit if limit >= 0 else length for limit in window_size)
        unseen = (distance < -behind) | (distance > before)
        scores = (scale * q @ k.transpose(1, 2)).masked_fill(unseen, float("-inf"))
        out[tokens] = (scores.softmax(dim=-1) @ v).transpose(0, 1)
    return out


class Recorder:
    def __call__(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, Callable[[], object]]:
        expected = run()
        result = expected.clone()
        return expected, result, lambda: result.copy_(run())


class WrongRecorder:
    def __call__(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, Callable[[], object]]:
        return run(), run().fill_(float("nan")), lambda: None


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU in place of a GPU, with pages that short sequences fill."""
    monkeypatch.setattr(flat_runner, "can_page", lambda *_: True)
    monkeypatch.setattr(paged, "varlen_attn", varlen_attn)
    monkeypatch.setattr(decode_graphs, "Recorder", Recorder)
    for module in (paged, decode_graphs):
        monkeypatch.setattr(module, "PAGE", 32)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("kind", FLAT)
async def test_greedy_text_equals_generate(kind: str, model_folders: dict[str, Path], tmp_path: Path) -> None:
    """With and without adapters, beginnings that were read before, and too few pages for all."""
    folder, requests = model_folders[kind], mixed_requests(kind)
    adapters = save_adapters(folder, tmp_path)
    engine = NativeEngine(folder, tokenizer=Ids(), dtype="fp32", max_batch_size=7, max_cache_tokens=320)  # type: ignore[arg-type]
    async with running(engine):
        stepper = engine._stepper
        assert stepper is not None
        runner = stepper.runner
        assert isinstance(runner, FlatRunner)
        answers = await asyncio.gather(*(chosen(engine, prompt, 25, adapters[name]) for name, prompt in requests))
        assert isinstance(runner.cache, PagedCache)
        assert runner.cache.num_held == 0
        assert runner.prefixes.num_tokens > 0
        assert stepper.num_preempted > 0
        assert runner._graphs is not None
        assert runner._graphs._is_working
        assert len(runner._graphs._graphs) > 2
    models = merged_models(folder, adapters)
    for (name, prompt), got in zip(requests, answers, strict=True):
        assert_greedy(models[name], prompt, got)


@pytest.mark.usefixtures("stand_in")
@torch.inference_mode()
def test_one_graph_serves_other_tokens_pages_and_adapters(model_folders: dict[str, Path], tmp_path: Path) -> None:
    """As long as their numbers round up to the same, and what is stacked stays where it is. A graph is made when its
    like is met for the second time in a row."""
    folder = model_folders["llama"]
    with torch.inference_mode(False):
        for number, name in enumerate("abcd"):
            rank = 20 if name == "d" else 4
            save_adapter(load_model(folder), tmp_path / name, seed=number, rank=rank, use_dora=name == "c")
    runner = load_runner(folder, "fp32", max_rows=8, with_adapters=True)
    assert isinstance(runner, FlatRunner)
    assert runner._graphs is not None
    a, b, c, d = (load_adapter(AdapterRef(name, tmp_path / name), runner.layers) for name in "abcd")
    num_graphs = []
    for adapters in ([a, b, None], [b, None, a], [None, None, None], [a, c, None], [a, a, b], [a, d, None]):
        rows = [runner.open([number] * 40, adapter, anew=True) for number, adapter in enumerate(adapters)]
        prompts = [list(range(number, number + 35)) for number in range(len(rows))]
        reads = zip(rows, prompts, adapters, strict=True)
        runner.forward([Feed(row, prompt, adapter, True) for row, prompt, adapter in reads])
        feeds = [Feed(row, [7 + n], adapter, True) for n, (row, adapter) in enumerate(zip(rows, adapters, strict=True))]
        runner._graphs(feeds)
        got = runner._graphs(feeds)
        assert got is not None
        torch.testing.assert_close(got, runner._read(feeds)[: len(feeds)], rtol=1e-4, atol=1e-4)
        num_graphs.append(len(runner._graphs._graphs))
        for row in rows:
            runner.close(row)
    assert num_graphs == [1, 1, 2, 3, 4, 5]


class Operations(TorchDispatchMode):
    """Counts the operations of torch that run within."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", FLAT)
def test_a_decoding_step_neither_waits_for_the_device_nor_brings_numbers_to_it(
    kind: str, model_folders: dict[str, Path], tmp_path: Path, stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either would keep it out of a graph; with LoRA and DoRA."""
    monkeypatch.setattr(paged, "varlen_attn", lambda query, *_, **__: query.clone())
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda _: True)  # as it says during a capture
    runner = load_runner(model_folders[kind], "fp32", max_rows=3, with_adapters=True)
    assert isinstance(runner, FlatRunner)
    assert runner._graphs is not None
    adapters = []
    for use_dora in (False, True):
        folder = save_adapter(load_model(model_folders[kind]), tmp_path / f"{use_dora}", seed=1, use_dora=use_dora)
        adapters.append(load_adapter(AdapterRef(f"{use_dora}", folder), runner.layers))
    rows = [runner.open([1], None, anew=True) for _ in range(3)]
    inputs = decode_graphs._inputs_of([Feed(row, [1], None, True) for row in rows])
    for stack in runner._graphs._stacks:
        seats = seats_of(stack, [*adapters, None])
        assert seats is not None
        slots = Slots(seats, inputs.shape[1], runner.device)
        slots.fill(seats)
        stack.plan = slots.plan
    with torch.no_grad(), Operations() as operations:
        runner._graphs._logits(inputs)
    assert operations.counts["index_copy_"] > 0
    for forbidden in ("_local_scalar_dense", "lift_fresh", "nonzero", "equal", "masked_select", "unique"):
        assert not operations.counts[forbidden], forbidden


@pytest.mark.usefixtures("stand_in")
def test_a_graph_that_is_wrong_is_not_used(
    model_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(decode_graphs, "Recorder", WrongRecorder)
    with torch.inference_mode():
        runner = load_runner(model_folders["llama"], "fp32", max_rows=2, with_adapters=False)
        assert isinstance(runner, FlatRunner)
        assert runner._graphs is not None
        row = runner.open([1], None, anew=True)
        assert runner._graphs([Feed(row, [1], None, True)]) is None
        assert not caplog.text
        assert runner._graphs([Feed(row, [1], None, True)]) is None
    assert "a CUDA graph is wrong" in caplog.text


def test_the_problem_that_flash_attention_is_asked_tells_right_from_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = StateShape(1, 2, 16, torch.float32, torch.device("cpu"))
    monkeypatch.setattr(paged, "varlen_attn", varlen_attn)
    assert paged.largest_error(shape, 6) < 1e-4
    for change in ({"window_size": (-1, 0), "num_splits": 1}, {"scale": 0.3}):
        monkeypatch.setattr(paged, "varlen_attn", lambda *args, _own=change, **rest: varlen_attn(*args, **rest | _own))
        assert paged.largest_error(shape, 6) > 0.02
    monkeypatch.setattr(paged, "varlen_attn", lambda query, *_, **__: torch.full_like(query, float("nan")))
    assert not paged.largest_error(shape, 6) <= 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("kind", FLAT)
@torch.inference_mode()
def test_a_gpu_takes_pages_and_graphs_and_says_what_pools_say(
    kind: str, model_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folders[kind]
    with torch.inference_mode(False):
        save_adapter(load_model(folder), tmp_path / "a", seed=1)
    logits = []
    for is_paged in (True, False):
        if not is_paged:
            monkeypatch.setattr(flat_runner, "can_page", lambda *_: False)
        runner = load_runner(folder, "bf16", max_rows=4, with_adapters=True)
        assert isinstance(runner, FlatRunner)
        assert isinstance(runner.cache, PagedCache) == is_paged
        adapter = load_adapter(AdapterRef("a", tmp_path / "a"), runner.layers)
        prompts, adapters = [[1] * 60, [2, 3], [4] * 90], [adapter, None, adapter]
        rows = [runner.open(prompt, None, anew=True) for prompt in prompts]
        for tokens in (prompts, [[5], [6], [7]], [[8], [9], [10]], [[11], [12], [13]]):
            feeds = zip(rows, tokens, adapters, strict=True)
            logits.append(runner.forward([Feed(row, ids, adapter, True) for row, ids, adapter in feeds]).cpu())
        if is_paged:
            assert runner._graphs is not None
            assert runner._graphs._is_working
            assert len(runner._graphs._graphs) == 1
    for got, expected in zip(logits[:4], logits[4:], strict=True):
        assert ((got - expected).norm(dim=-1) <= 0.05 * expected.norm(dim=-1)).all()
