"""Attention of one step over a flat row of tokens: one new token of each running sequence, then pieces of prompts.

Registered with transformers as `FLAT`; a step's `AttentionPlan` travels to it through the model's keyword arguments.
Grouped query heads are rows of one product with their keys. Numbers of keys and of queries are rounded up, because on a
CPU oneDNN compiles a product anew for each shape that it meets; what is beyond is masked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from service.engine.native.kv_cache import Pool, Row

FLAT = "tunesmith_flat"


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


@dataclass
class Piece:
    """A piece of one prompt."""

    row: Row
    start: int  # tokens before it
    tokens: slice  # of the flat row
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)  # by window


@dataclass
class AttentionPlan:
    """Who attends to what in one step."""

    newest: list[Newest]
    pieces: list[Piece]
    num_tokens: int  # with padding at the end, which nobody looks at
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
        keys and values go into the cache."""
        outputs = [_newest(part, layer, query, key, value, scale, window) for part in self.newest]
        outputs += [_piece(part, layer, query, key, value, scale, window) for part in self.pieces]
        num_left = self.num_tokens - sum(len(output) for output in outputs)
        if num_left:
            outputs.append(query.new_zeros(num_left, *query.shape[1:]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _newest(
    part: Newest,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    states = part.pool.states[layer]  # [2, rows, KV heads, capacity, head size]
    states[:, part.rows, :, part.positions] = torch.stack((key[part.tokens], value[part.tokens]), dim=1)
    q = query[part.tokens]
    is_spread = part.num_rows != len(q)
    if is_spread:
        q = q.new_zeros(part.num_rows, *q.shape[1:]).index_copy_(0, part.rows, q)
    if (mask := part.masks.get(window)) is None:
        mask = part.masks[window] = _newest_mask(part, states.shape[2], window, q)
    keys, values = states[:, : part.num_rows, :, : part.num_keys]
    found = _grouped(q[:, :, None], keys, values, mask, scale)
    return found[part.rows, :, 0] if is_spread else found[:, :, 0]


def _newest_mask(part: Newest, num_heads: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """[rows * KV heads, 1, keys]: 0 on what a row's newest token sees, else minus infinity."""
    newest = torch.zeros(part.num_rows, dtype=torch.long, device=like.device).index_copy_(0, part.rows, part.positions)
    key = torch.arange(part.num_keys, device=like.device)
    unseen = key > newest[:, None]
    if window is not None:
        unseen |= key <= newest[:, None] - window
    mask = like.new_zeros(unseen.shape).masked_fill_(unseen, float("-inf"))
    return mask.repeat_interleave(num_heads, dim=0)[:, None]


def _piece(
    part: Piece,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    num = part.tokens.stop - part.tokens.start
    end = part.start + num
    keys, values = part.row.pool.states[layer, :, part.row.number]  # [KV heads, capacity, head size]
    keys[:, part.start : end] = key[part.tokens].transpose(0, 1)
    values[:, part.start : end] = value[part.tokens].transpose(0, 1)
    q = query[part.tokens].transpose(0, 1)  # [heads, tokens, head size]
    num_queries, num_keys = rounded(num), min(rounded(end), keys.shape[1])
    if (mask := part.masks.get(window)) is None:
        mask = _piece_mask(part.start, num_queries, num_keys, window, q)
        mask = part.masks[window] = mask.repeat(1, len(q) // len(keys), 1)
    padded = q.new_empty(len(q), num_queries, q.shape[-1])  # whatever is behind: it becomes rows that nobody looks at
    padded[:, :num] = q
    found = _grouped(padded[None], keys[None, :, :num_keys], values[None, :, :num_keys], mask, scale)
    return found[0, :, :num].transpose(0, 1)


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
