"""The kernels for bf16 compute what torch computes from the formulas in fp32, within the rounding of bf16."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from service.engine.native import cpu_kernels
from service.engine.native.adapters import load_adapter
from service.engine.native.cpu_kernels import CpuKernels, kernels_for, panels_of, weight_of
from service.engine.native.runner import Feed, load_runner
from service.engine.protocol import AdapterRef
from tests.engine.lora import merged, save_adapter
from tests.engine.models import FLAT, load_model


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    torch.manual_seed(5)
    without = getattr(request, "param", [])
    if without and platform.machine() != "x86_64":
        pytest.skip("flags of another processor")
    found = cpu_kernels._load(*without)
    if found is None:
        pytest.skip("gcc is not installed here")
    return found


# A processor's products of tiles and of vectors, where it has them, and plain ones.
by_all_instructions = pytest.mark.parametrize(
    "kernels", [[], ["-mno-amx-bf16"], ["-mno-amx-bf16", "-mno-avx512bf16"]], indirect=True
)


def test_other_types_have_none() -> None:
    assert kernels_for(torch.empty(1)) is None


def test_without_a_compiler_there_are_none(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PATH", "")
    assert cpu_kernels._load.__wrapped__() is None
    assert "gcc is not installed" in caplog.text


@pytest.mark.parametrize("num_tokens", [1, 2, 13, 16, 33, 100])
@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(32, 7), (576, 96), (96, 100)])
@by_all_instructions
def test_products(kernels: CpuKernels, num_tokens: int, num_inputs: int, num_outputs: int) -> None:
    x, weight, bias = bf16(num_tokens, num_inputs), bf16(num_outputs, num_inputs), bf16(num_outputs)
    residual = bf16(num_tokens, num_outputs)
    panels = panels_of(weight)
    assert torch.equal(weight_of(panels, num_outputs), weight)
    expected = x.float() @ weight.float().T
    close = {"rtol": 8e-3, "atol": 1e-2}
    torch.testing.assert_close(kernels.linear(x, panels, num_outputs, None).float(), expected, **close)
    expected += bias.float() + residual.float()
    torch.testing.assert_close(kernels.linear(x, panels, num_outputs, bias, residual).float(), expected, **close)


FUSED = ("llama", "mistral-window", "qwen2", "qwen3")


@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("use_dora", [None, False, True])
@torch.inference_mode()
def test_a_layer_in_one_call_is_what_torch_makes_of_it(
    kind: str, use_dora: bool | None, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """In one pass: single tokens, short and long pieces of prompts, with and without an adapter."""
    folder, generator = model_folders[kind], torch.Generator().manual_seed(3)
    ids = [torch.randint(256, (num,), generator=generator).tolist() for num in (1, 1, 7, 100)]
    if use_dora is not None:
        with torch.inference_mode(False):
            save_adapter(load_model(folder), tmp_path / "adapter", seed=1, use_dora=use_dora)
    logits = []
    for is_by_kernel in (True, False):
        runner = load_runner(folder, "bf16", max_rows=4, with_adapters=True)
        layers: Any = runner._model.model.layers  # type: ignore[attr-defined]
        if any(layer.kernel is None for layer in layers):
            pytest.skip("gcc is not installed here")
        if not is_by_kernel:
            for layer in layers:
                layer.kernel = None
        adapter = None
        if use_dora is not None:
            adapter = load_adapter(AdapterRef("a", tmp_path / "adapter"), runner.layers)
        adapters = [None, adapter, adapter, None]
        feeds = [
            Feed(runner.open(each, own, anew=True), each, own, True) for each, own in zip(ids, adapters, strict=True)
        ]
        logits.append(runner.forward(feeds))
    got, expected = logits
    assert ((got - expected).norm(dim=-1) <= 0.03 * expected.norm(dim=-1)).all()


@torch.inference_mode()
def test_what_is_no_number_stays_so_and_stays_by_itself(model_folders: dict[str, Path]) -> None:
    runner = load_runner(model_folders["llama"], "bf16", max_rows=2, with_adapters=False)
    feeds = [Feed(runner.open([token], None, anew=True), [token], None, True) for token in (1, 2)]
    embeddings: Any = runner._model.get_input_embeddings()  # type: ignore[attr-defined]
    embeddings.weight[2] = float("nan")
    logits = runner.forward(feeds)
    assert logits[0].isfinite().all()
    assert logits[1].isnan().all()


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "size"), [(9, 3, 64), (4, 4, 128), (6, 1, 20)])
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("is_side_by_side", [True, False])
def test_attention_of_any_tokens(
    kernels: CpuKernels, num_heads: int, num_kv_heads: int, size: int, window: int | None, is_side_by_side: bool
) -> None:
    """Newest tokens of long rows, and a piece of a prompt whose tokens see each other; rows that are not named stay."""
    cache = bf16(2, 4, num_kv_heads, 300, size)
    which = torch.tensor([[0, 2, 3, 4, 6], [1, 3, 3, 3, 0], [299, 10, 11, 12, 0]])
    if is_side_by_side:
        q, k, v = bf16(8, num_heads + 2 * num_kv_heads, size).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    else:
        q, k, v = (bf16(heads, 8, size).transpose(0, 1) for heads in (num_heads, num_kv_heads, num_kv_heads))
    expected_cache, out = cache.clone(), torch.full((8, num_heads, size), 7.0).bfloat16()
    for token, row, position in which.T.tolist():
        expected_cache[:, row, :, position] = torch.stack((k[token], v[token]))
    kernels.attend(out, q, k, v, cache, which, scale=0.3, window=window)
    assert torch.equal(cache, expected_cache)
    for token, row, position in which.T.tolist():
        start = max(0, position + 1 - window) if window else 0
        keys, values = expected_cache[:, row, :, start : position + 1].float()
        queries = q[token].float().view(num_kv_heads, -1, size)
        expected = torch.softmax(0.3 * queries @ keys.transpose(1, 2), dim=-1) @ values
        torch.testing.assert_close(out[token].float(), expected.view(num_heads, size), rtol=1e-2, atol=2e-3)
    assert (out[[1, 5, 7]] == 7).all()


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "size"), [(9, 3, 64), (4, 4, 128), (6, 1, 20), (32, 1, 96), (2, 1, 256)]
)
@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize(("start", "num"), [(0, 1), (0, 70), (5, 64), (230, 7), (100, 200)])
@by_all_instructions
def test_attention_of_a_piece(
    kernels: CpuKernels, num_heads: int, num_kv_heads: int, size: int, window: int | None, start: int, num: int
) -> None:
    """Also where a row holds what is no number behind its tokens, or in front of a window's first."""
    if not kernels.can_attend_piece(size):
        pytest.skip("without products of bf16")
    cache = bf16(2, num_kv_heads, 300, size)
    cache[:, :, start + num :] = float("nan")
    cache[:, :, : max(0, start + 1 - window) if window else 0] = float("nan")
    q, k, v = bf16(num, num_heads + 2 * num_kv_heads, size).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    expected_cache, out = cache.clone(), torch.empty(num, num_heads, size).bfloat16()
    expected_cache[:, :, start : start + num] = torch.stack((k, v)).transpose(1, 2)
    kernels.attend_piece(out, q, k, v, cache, start, scale=0.3, window=window)
    assert torch.equal(cache.nan_to_num(9), expected_cache.nan_to_num(9))
    seen = expected_cache[:, :, : start + num].float().nan_to_num()
    keys, values = seen.repeat_interleave(num_heads // num_kv_heads, dim=1)
    distance = torch.arange(start, start + num)[:, None] - torch.arange(start + num)
    unseen = (distance < 0) | (distance >= (window or 10**6))
    scores = (0.3 * q.float().transpose(0, 1) @ keys.transpose(1, 2)).masked_fill(unseen, float("-inf"))
    expected = (scores.softmax(dim=-1) @ values).transpose(0, 1)
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=8e-3)


@pytest.mark.parametrize("kind", [*FLAT, "gpt2"])
@torch.inference_mode()
def test_a_bf16_model_with_adapters_is_as_close_to_fp32_as_transformers_is(
    kind: str, model_folders: dict[str, Path], tmp_path: Path
) -> None:
    """Short and long pieces of prompts and single tokens in one pass, with adapters and without."""
    folder, generator = model_folders[kind], torch.Generator().manual_seed(3)
    names = (None, "a", "b", "a", None)
    with torch.inference_mode(False):
        for seed, name in enumerate(("a", "b")):
            save_adapter(load_model(folder), tmp_path / name, seed=seed, rank=3 + seed)
    runner = load_runner(folder, "bf16", max_rows=5, with_adapters=True)
    loaded = {name: load_adapter(AdapterRef(name, tmp_path / name), runner.layers) for name in ("a", "b")}
    ids = [torch.randint(256, (num,), generator=generator).tolist() for num in (5, 120, 60, 3, 2)]
    places = [runner.open(each, None, anew=True) for each in ids]
    adapters = [None if name is None else loaded[name] for name in names]
    starts = [0, 100, 20, 2, 1]
    sequences = list(zip(places, ids, adapters, starts, strict=True))
    runner.forward([Feed(place, each[:start], adapter, False) for place, each, adapter, start in sequences if start])
    got = runner.forward([Feed(place, each[start:], adapter, True) for place, each, adapter, start in sequences])
    expected, rounded = [], []
    for each, name in zip(ids, names, strict=True):
        with torch.inference_mode(False):
            exact = load_model(folder) if name is None else merged(load_model(folder), tmp_path / name)
        expected.append(exact(torch.tensor([each])).logits[0, -1].float())
        rounded.append(exact.bfloat16()(torch.tensor([each])).logits[0, -1].float())
    right = torch.stack(expected)
    assert (got - right).norm() <= 2 * (torch.stack(rounded) - right).norm() + 0.05 * right.norm()
