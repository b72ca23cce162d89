"""Attention of one step over a flat row of tokens: one new token of each running sequence, then pieces of prompts.

Registered with transformers as `FLAT`; a step's `AttentionPlan` travels to it through the model's keyword arguments.
A bf16 model on a CPU has kernels for single tokens and short pieces, and for long pieces; else, grouped query heads are
rows of one product with their keys. Numbers of keys and of queries are rounded up, because on a CPU oneDNN compiles a
product anew for each shape that it meets; what is beyond is masked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from service.engine.native.cpu_kernels import CpuKernels
from service.engine.native.kv_cache import Pool, Row

FLAT = "tunesmith_flat"


class Part(Protocol):
    """Some tokens of a step."""

    def attend(
        self,
        out: torch.Tensor,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> None:
        """Write keys and values of these tokens into the cache, and into `out` what they attend to."""
        ...


@dataclass
class AttentionPlan:
    """Who attends to what in one step."""

    parts: list[Part]
    shared: dict[str, Any] = field(default_factory=dict)  # what the first layer makes for all of them

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None = None,
    ) -> torch.Tensor:
        """[tokens, heads, head size] of query [tokens, heads, head size] and key and value with perhaps fewer heads;
        keys and values go into the cache. Of padding, which belongs to no part, it is anything."""
        out = query.new_empty(query.shape)
        for part in self.parts:
            part.attend(out, layer, query, key, value, scale, window)
        return out


@dataclass
class Scattered:
    """Any tokens of sequences whose rows lie in one pool, for the kernel that takes each by itself."""

    kernels: CpuKernels
    pool: Pool
    which: torch.Tensor  # int64 [3, tokens]: numbers in the flat row, rows, positions

    def __post_init__(self) -> None:
        _, row, position = self.which.amax(dim=1).tolist()
        assert row < self.pool.num_rows
        assert position < self.pool.capacity

    def attend(
        self,
        out: torch.Tensor,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> None:
        """See Part."""
        cache = self.pool.states[layer]
        self.kernels.attend(out, query, key, value, cache, self.which, scale=scale, window=window)


@dataclass
class Whole:
    """A piece of one prompt, for the kernel that takes its tokens together."""

    kernels: CpuKernels
    row: Row
    start: int  # tokens before it
    tokens: slice  # of the flat row

    def attend(
        self,
        out: torch.Tensor,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> None:
        """See Part."""
        own, q, k, v = (x[self.tokens] for x in (out, query, key, value))
        cache = self.row.pool.states[layer, :, self.row.number]
        self.kernels.attend_piece(own, q, k, v, cache, self.start, scale=scale, window=window)


@dataclass
class Newest:
    """The newest tokens of sequences whose rows lie in one pool, in the order of the rows."""

    pool: Pool
    rows: torch.Tensor  # int64 [tokens]
    positions: torch.Tensor  # int64 [tokens]
    tokens: slice  # of the flat row
    num_rows: int  # of the pool that are computed with; more than tokens if some have none in this step
    num_keys: int
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)  # by window

    def attend(
        self,
        out: torch.Tensor,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> None:
        """See Part."""
        states = self.pool.states[layer]  # [2, rows, KV heads, capacity, head size]
        states[:, self.rows, :, self.positions] = torch.stack((key[self.tokens], value[self.tokens]), dim=1)
        q = query[self.tokens]
        is_spread = self.num_rows != len(q)
        if is_spread:
            q = q.new_zeros(self.num_rows, *q.shape[1:]).index_copy_(0, self.rows, q)
        if (mask := self.masks.get(window)) is None:
            mask = self.masks[window] = _newest_mask(self, states.shape[2], window, q)
        keys, values = states[:, : self.num_rows, :, : self.num_keys]
        found = _grouped(q[:, :, None], keys, values, mask, scale)
        out[self.tokens] = found[self.rows, :, 0] if is_spread else found[:, :, 0]


@dataclass
class Piece:
    """A piece of one prompt."""

    row: Row
    start: int  # tokens before it
    tokens: slice  # of the flat row
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)  # by window

    def attend(
        self,
        out: torch.Tensor,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
    ) -> None:
        """See Part."""
        num = self.tokens.stop - self.tokens.start
        end = self.start + num
        keys, values = self.row.pool.states[layer, :, self.row.number]  # [KV heads, capacity, head size]
        keys[:, self.start : end] = key[self.tokens].transpose(0, 1)
        values[:, self.start : end] = value[self.tokens].transpose(0, 1)
        q = query[self.tokens].transpose(0, 1)  # [heads, tokens, head size]
        num_queries, num_keys = rounded(num), min(rounded(end), keys.shape[1])
        if (mask := self.masks.get(window)) is None:
            mask = _piece_mask(self.start, num_queries, num_keys, window, q)
            mask = self.masks[window] = mask.repeat(1, len(q) // len(keys), 1)
        padded = q.new_empty(len(q), num_queries, q.shape[-1])  # whatever is behind becomes rows that nobody looks at
        padded[:, :num] = q
        found = _grouped(padded[None], keys[None, :, :num_keys], values[None, :, :num_keys], mask, scale)
        out[self.tokens] = found[0, :, :num].transpose(0, 1)


def _newest_mask(part: Newest, num_heads: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """[rows * KV heads, 1, keys]: 0 on what a row's newest token sees, else minus infinity."""
    newest = torch.zeros(part.num_rows, dtype=torch.long, device=like.device).index_copy_(0, part.rows, part.positions)
    key = torch.arange(part.num_keys, device=like.device)
    unseen = key > newest[:, None]
    if window is not None:
        unseen |= key <= newest[:, None] - window
    mask = like.new_zeros(unseen.shape).masked_fill_(unseen, float("-inf"))
    return mask.repeat_interleave(num_heads, dim=0)[:, None]


def _piece_mask(start: int, num_queries: int, num_keys: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """[1, queries, keys]: 0 on what each token of a piece sees, else minus infinity."""
    distance = (start + torch.arange(num_queries, device=like.device))[:, None] - torch.arange(
        num_keys, device=like.device
    )
    unseen = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return like.new_zeros(unseen.shape).masked_fill_(unseen, float("-inf"))[None]


def _grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(scale Q K^T + mask) V of q [rows, heads, queries, size] and k, v [rows, KV heads, keys, size], with the
    mask [rows * KV heads or 1, 1 or heads of a KV head * queries, keys]; the same shape as q."""
    num_rows, num_heads, num_queries, size = q.shape
    num_kv = k.shape[1]
    group = num_heads // num_kv
    q = q.reshape(num_rows * num_kv, group * num_queries, size)
    scores = torch.baddbmm(mask, q, k.flatten(0, 1).transpose(1, 2), alpha=scale)
    return torch.bmm(torch.softmax(scores, dim=-1), v.flatten(0, 1)).view(num_rows, num_heads, num_queries, size)


def rounded(num: int) -> int:
    """One of few sizes: up to a quarter of a power of two more than asked for, and at least 32 apart."""
    multiple = max(32, (1 << num.bit_length()) // 8)
    return -(-num // multiple) * multiple


def flat_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    plan: AttentionPlan | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [1, heads, tokens, head size], result [1, tokens, heads, head size]."""
    assert plan is not None, "a flat row needs the step's plan"
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: Any = module.layer_idx
    return plan.attend(layer, q, k, v, scale, sliding_window)[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    """The plan knows who sees whom."""


AttentionInterface.register(FLAT, flat_attention)
AttentionMaskInterface.register(FLAT, _no_mask)
