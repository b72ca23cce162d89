"""Attention of short sequences on a CPU, as few batched matrix products of few different shapes.

torch's flash attention for CPUs is slow at the lengths of ordinary rows (its backward pass above all), and keeps
compiled kernels for every length it ever saw, which adds up to gigabytes over a run. Here lengths are rounded up, and
sequences of one rounded length are taken together, so that shapes repeat. A sequence's padding lies after it, where
no causal position looks; other views have it masked. Probabilities are kept for the backward pass: MAX_SHORT numbers a
token and head at most.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch

MAX_SHORT = 512
_MULTIPLE = 32  # lengths are rounded up to it
_MAX_TOGETHER = 8  # sequences in one product; their numbers are powers of two


class View(NamedTuple):
    """What a position sees, and how."""

    scale: float  # of the products of query and key
    causal: bool = True
    sliding_window: int | None = None  # positions seen, with one's own; of a causal view only
    dropout: float = 0.0  # share of the probabilities that are set to zero


class _Piece(NamedTuple):
    """Sequences of one rounded length, which are batches of its products, and the places of their rows."""

    lengths: tuple[int, ...]  # before they were rounded
    length: int
    queries: slice  # rows [KV heads, sequences, query heads of a KV head, length]
    keys: slice  # rows [KV heads, sequences, length]


class _Rows(NamedTuple):
    """How rows, one for each token and head, are brought into the order of the pieces and back."""

    padded: torch.Tensor  # [padded rows]: the row that stands there, or any of the same sequence on padding
    is_padding: torch.Tensor  # [paddings]: where padding stands
    place: torch.Tensor  # [rows]: where each row stands


class _Layout(NamedTuple):
    """Where the rows of a packed row's tokens stand when each sequence is padded to its rounded length."""

    queries: _Rows
    keys: _Rows
    pieces: tuple[_Piece, ...]


def short_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    view: View,
) -> torch.Tensor:
    """[tokens, heads, head_dim] from the same, with key and value of perhaps fewer heads."""
    out: torch.Tensor = _ShortAttention.apply(query, key, value, lengths, view)
    return out


class _ShortAttention(torch.autograd.Function):
    """dropout(softmax(scale * Q K^T + mask)) V, piece by piece, with the backward pass written out."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...], view: View
    ) -> torch.Tensor:
        num_kv_heads, head_dim = key.shape[1:]
        group = query.shape[1] // num_kv_heads
        layout = _layout(lengths, num_kv_heads, group)
        q = query.reshape(-1, head_dim).index_select(0, layout.queries.padded)
        k, v = (x.reshape(-1, head_dim).index_select(0, layout.keys.padded) for x in (key, value))
        out, probabilities, noises = torch.empty_like(q), [], []
        for piece in layout.pieces:
            batches = (num_kv_heads * len(piece.lengths), -1, head_dim)
            queries, keys, values = (
                q[piece.queries].view(batches),
                k[piece.keys].view(batches),
                v[piece.keys].view(batches),
            )
            if view.causal:
                mask = _causal_mask(piece.length, group, view.sliding_window, q.dtype)
            else:
                mask = _key_mask(piece, num_kv_heads, q.dtype)
            p = torch.softmax(torch.baddbmm(mask, queries, keys.transpose(1, 2), alpha=view.scale), dim=-1)
            probabilities.append(p)
            if view.dropout:
                noises.append(_noise(p, view.dropout))
                p = p * noises[-1]
            torch.bmm(p, values, out=out[piece.queries].view(batches))
        ctx.save_for_backward(q, k, v, *probabilities, *noises)
        ctx.layout, ctx.num_kv_heads, ctx.scale, ctx.has_noise = layout, num_kv_heads, view.scale, bool(noises)
        return out.index_select(0, layout.queries.place).view(query.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        layout, head_dim = ctx.layout, q.shape[1]
        num_pieces = len(layout.pieces)
        probabilities, noises = kept[:num_pieces], kept[num_pieces:] if ctx.has_noise else [None] * num_pieces
        d_out = grads[0].reshape(-1, head_dim).index_select(0, layout.queries.padded)
        d_out.index_fill_(0, layout.queries.is_padding, 0)  # nothing flows back from padding
        d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
        for piece, p, noise in zip(layout.pieces, probabilities, noises, strict=True):
            batches = (len(p), -1, head_dim)
            queries, d_queries, upstream = (x[piece.queries].view(batches) for x in (q, d_q, d_out))
            keys, d_keys, values, d_values = (x[piece.keys].view(batches) for x in (k, d_k, v, d_v))
            d_p = torch.bmm(upstream, values.transpose(1, 2))
            d_p = d_p if noise is None else d_p.mul_(noise)
            d_scores = torch._softmax_backward_data(d_p, p, -1, p.dtype)
            d_queries.baddbmm_(d_scores, keys, beta=0, alpha=ctx.scale)
            d_keys.baddbmm_(d_scores.transpose(1, 2), queries, beta=0, alpha=ctx.scale)
            torch.bmm((p if noise is None else p * noise).transpose(1, 2), upstream, out=d_values)
        d_query = d_q.index_select(0, layout.queries.place).view(grads[0].shape)
        d_key, d_value = (x.index_select(0, layout.keys.place).view(-1, ctx.num_kv_heads, head_dim) for x in (d_k, d_v))
        return d_query, d_key, d_value, None, None


def _noise(like: torch.Tensor, dropout: float) -> torch.Tensor:
    """0 where a number is dropped, else what keeps the mean. A draw of 64 bits decides on four numbers, by 16 bits
    each: torch's `bernoulli_` takes five times as long."""
    num_kept = max(1, min(2**16 - 1, round((1 - dropout) * 2**16)))  # of the values of 16 bits
    draws = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: like.numel()].view(like.shape) < num_kept - 2**15
    return kept.to(like.dtype).mul_(2**16 / num_kept)


@lru_cache(maxsize=8)
def _layout(lengths: tuple[int, ...], num_kv_heads: int, group: int) -> _Layout:
    """The same for all layers of a pass, so it is kept. `group` query heads share a key, as rows of one product."""
    tokens, is_padding, pieces = [], [], []  # of each piece, [sequences, length]
    start = at = 0
    for rounded, same in groupby(lengths, key=lambda length: -(-length // _MULTIPLE) * _MULTIPLE):
        position, together = torch.arange(rounded), list(same)
        while together:
            count = min(_MAX_TOGETHER, 1 << (len(together).bit_length() - 1))
            own, together = torch.tensor(together[:count])[:, None], together[count:]
            starts = start + own.cumsum(0) - own
            tokens.append(starts + position.minimum(own - 1))
            is_padding.append(position.expand(count, -1) >= own)
            start, end = start + int(own.sum()), at + count * rounded
            queries, keys = (slice(at * heads, end * heads) for heads in (num_kv_heads * group, num_kv_heads))
            pieces.append(_Piece(tuple(own[:, 0].tolist()), rounded, queries, keys))
            at = end
    query_rows, key_rows = (_rows(tokens, is_padding, num_kv_heads, heads) for heads in (group, 1))
    return _Layout(query_rows, key_rows, tuple(pieces))


def _rows(tokens: list[torch.Tensor], is_padding: list[torch.Tensor], num_kv_heads: int, group: int) -> _Rows:
    """The rows of num_kv_heads * group heads of a token, which come one after the other."""
    head = torch.arange(num_kv_heads * group).view(num_kv_heads, 1, group, 1)
    padded = torch.cat([(x[:, None] * head.numel() + head).flatten() for x in tokens])
    padding = torch.cat([x[:, None].expand(num_kv_heads, -1, group, -1).flatten() for x in is_padding])
    standing = (~padding).nonzero()[:, 0]
    place = torch.empty_like(standing)
    place[padded[standing]] = standing
    return _Rows(padded, padding.nonzero()[:, 0], place)


@lru_cache(maxsize=64)
def _causal_mask(length: int, group: int, sliding_window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """[1, group * length, length]: 0 where a position may look, else minus infinity."""
    position = torch.arange(length)
    distance = position[:, None] - position[None, :]
    allowed = (distance >= 0) & (distance < (sliding_window or length))
    return torch.zeros(1, length, length, dtype=dtype).masked_fill_(~allowed, float("-inf")).repeat(1, group, 1)


def _key_mask(piece: _Piece, num_kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
    """[KV heads * sequences, 1, length]: 0 on the tokens of a sequence, minus infinity on its padding."""
    is_padding = torch.arange(piece.length)[None] >= torch.tensor(piece.lengths)[:, None]
    mask = torch.zeros(is_padding.shape, dtype=dtype).masked_fill_(is_padding, float("-inf"))
    return mask[:, None].repeat(num_kv_heads, 1, 1)
