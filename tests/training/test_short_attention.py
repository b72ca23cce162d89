"""Packed attention on a CPU: every sequence sees what it should and nothing else, forwards and backwards."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from training.attention import packed_attention
from training.short_attention import MAX_SHORT, View, _noise, short_attention

LENGTHS = (MAX_SHORT + 30, 70, 64, 64, 64, 33, 5, 5, 5, 5, 5, 5, 5, 5, 5, 1, 17)  # the last one is a row's padding
HEAD_DIM = 8


def heads(num_heads: int, lengths: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(1, num_heads, sum(lengths), HEAD_DIM, dtype=dtype, requires_grad=True)


def one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, window: int | None) -> torch.Tensor:
    found = []
    for parts in zip(*(x.split(LENGTHS, dim=2) for x in (q, k, v)), strict=True):
        position = torch.arange(parts[0].shape[2])
        distance = position[:, None] - position[None, :]
        allowed = (distance >= 0) & (distance < (window or len(position))) if causal else distance > -len(position)
        found.append(scaled_dot_product_attention(*parts, allowed, enable_gqa=True))
    return torch.cat(found, dim=2).transpose(1, 2)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    ("causal", "window"), [(True, None), (True, 40), (False, None)], ids=["causal", "window", "both-ways"]
)
def test_a_packed_row_is_its_sequences_one_by_one(num_kv_heads: int, causal: bool, window: int | None) -> None:
    torch.manual_seed(0)
    q, k, v = heads(4, LENGTHS), heads(num_kv_heads, LENGTHS), heads(num_kv_heads, LENGTHS)
    module = cast(Any, SimpleNamespace(is_causal=causal))
    packed, _ = packed_attention(module, q, k, v, None, sliding_window=window, example_lengths=LENGTHS)
    single = one_by_one(q, k, v, causal, window)
    torch.testing.assert_close(packed, single, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(single)
    ours, theirs = (torch.autograd.grad(out, (q, k, v), upstream) for out in (packed, single))
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_dropout_that_was_drawn() -> None:
    lengths = (5, 3, 3)
    torch.manual_seed(0)
    inputs = tuple(torch.randn(sum(lengths), n, HEAD_DIM, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return short_attention(q, k, v, lengths, View(scale=0.5, causal=False, dropout=0.3))

    assert torch.autograd.gradcheck(attend, inputs)
    plain = short_attention(*inputs, lengths, View(scale=0.5, causal=False))
    assert not torch.allclose(attend(*inputs), plain)


def test_dropout_keeps_the_mean() -> None:
    lengths = (64,) * 64
    q, k = torch.zeros(sum(lengths), 2, HEAD_DIM), torch.zeros(sum(lengths), 2, HEAD_DIM)
    out = short_attention(q, k, torch.ones_like(k), lengths, View(scale=1.0, causal=False, dropout=0.2))
    assert out.std() > 0.01
    assert out.mean().item() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 1e-9])
def test_dropout_drops_its_share_at_random_and_keeps_the_mean(dropout: float) -> None:
    torch.manual_seed(0)
    noise = _noise(torch.empty(1001, 999), dropout)
    dropped = (noise == 0).double()
    assert dropped.mean().item() == pytest.approx(dropout, abs=0.002)
    assert noise.mean().item() == pytest.approx(1, abs=0.002)
    assert len(noise.unique()) <= 2
    for shift in (1, 2, 3, 4):  # four neighbours come of one draw
        both = (dropped.flatten()[shift:] * dropped.flatten()[:-shift]).mean().item()
        assert both == pytest.approx(dropout**2, abs=0.002)
    torch.manual_seed(0)
    assert torch.equal(noise, _noise(torch.empty(1001, 999), dropout)), "a resumed run draws the same"
