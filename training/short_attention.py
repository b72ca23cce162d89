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
    """Sequences of one rounded length, one after the other."""

    at: int  # the first one's first token
    lengths: tuple[int, ...]  # before they were rounded
    length: int

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)


class _Layout(NamedTuple):
    """Where the tokens of a packed row stand when each sequence is padded to its rounded length."""

    padded: torch.Tensor  # [padded tokens]: the token that stands there, or any of the same sequence on padding
    place: torch.Tensor  # [tokens]: where each token stands
    pieces: tuple[_Piece, ...]


def short_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    view: View,
) -> torch.Tensor:
    """[heads, tokens, head_dim] from the same, with key and value of perhaps fewer heads."""
    out: torch.Tensor = _ShortAttention.apply(query, key, value, lengths, view)
    return out


class _ShortAttention(torch.autograd.Function):
    """dropout(softmax(scale * Q K^T + mask)) V, piece by piece, with the backward pass written out."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...], view: View
    ) -> torch.Tensor:
        layout, group = _layout(lengths), query.shape[0] // key.shape[0]
        q, k, v = (x.index_select(1, layout.padded) for x in (query, key, value))
        out, probabilities, noises = torch.empty_like(q), [], []
        for piece in layout.pieces:
            mask = _causal_mask(piece.length, view.sliding_window, q.dtype) if view.causal else _key_mask(piece, q)
            mask = mask.repeat(1 if view.causal else k.shape[0], group if view.causal else 1, 1)
            scores = torch.baddbmm(mask, _take(q, piece, group), _take(k, piece).transpose(1, 2), alpha=view.scale)
            p = torch.softmax(scores, dim=-1)
            probabilities.append(p)
            if view.dropout:
                noises.append(_noise(p, view.dropout))
                p = p * noises[-1]
            _put(out, piece, torch.bmm(p, _take(v, piece)), group)
        ctx.save_for_backward(q, k, v, *probabilities, *noises)
        ctx.layout, ctx.group, ctx.scale = layout, group, view.scale
        return out.index_select(1, layout.place)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        layout, group = ctx.layout, ctx.group
        probabilities, noises = kept[: len(layout.pieces)], kept[len(layout.pieces) :] or [None] * len(layout.pieces)
        d_out = torch.zeros_like(q).index_copy_(1, layout.place, grads[0])  # nothing flows back from padding
        d_q, d_k, d_v = (torch.empty_like(x) for x in (q, k, v))
        for piece, p, noise in zip(layout.pieces, probabilities, noises, strict=True):
            d_piece = _take(d_out, piece, group)
            d_p = torch.bmm(d_piece, _take(v, piece).transpose(1, 2))
            d_p = d_p if noise is None else d_p.mul_(noise)
            d_scores = torch._softmax_backward_data(d_p, p, -1, p.dtype).mul_(ctx.scale)
            _put(d_q, piece, torch.bmm(d_scores, _take(k, piece)), group)
            _put(d_k, piece, torch.bmm(d_scores.transpose(1, 2), _take(q, piece, group)))
            _put(d_v, piece, torch.bmm((p if noise is None else p * noise).transpose(1, 2), d_piece))
        return *(x.index_select(1, layout.place) for x in (d_q, d_k, d_v)), None, None


def _noise(like: torch.Tensor, dropout: float) -> torch.Tensor:
    """0 where a number is dropped, else what keeps the mean. A draw of 64 bits decides on four numbers, by 16 bits
    each: torch's `bernoulli_` takes five times as long."""
    num_kept = max(1, min(2**16 - 1, round((1 - dropout) * 2**16)))  # of the values of 16 bits
    draws = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = draws.view(torch.int16)[: like.numel()].view(like.shape) < num_kept - 2**15
    return kept.to(like.dtype).mul_(2**16 / num_kept)


def _take(x: torch.Tensor, piece: _Piece, group: int = 1) -> torch.Tensor:
    """[KV heads * count, group * length, head_dim] of [heads, padded tokens, head_dim]: the query heads that share a
    key are rows of one product."""
    x = x[:, piece.at : piece.at + piece.num_sequences * piece.length].unflatten(1, (piece.num_sequences, piece.length))
    x = x.unflatten(0, (-1, group)).transpose(1, 2)  # [KV heads, count, group, length, head_dim]
    return x.flatten(2, 3).flatten(0, 1)


def _put(target: torch.Tensor, piece: _Piece, x: torch.Tensor, group: int = 1) -> None:
    """The inverse of `_take`."""
    place = target[:, piece.at : piece.at + piece.num_sequences * piece.length].unflatten(
        1, (piece.num_sequences, piece.length)
    )
    place = place.unflatten(0, (-1, group)).transpose(1, 2)
    place.copy_(x.view(place.shape))


@lru_cache(maxsize=8)
def _layout(lengths: tuple[int, ...]) -> _Layout:
    """The same for all layers of a pass, so it is kept."""
    padded, place, pieces = [], [], []
    start = at = 0
    for rounded, same in groupby(lengths, key=lambda length: -(-length // _MULTIPLE) * _MULTIPLE):
        position, together = torch.arange(rounded), list(same)
        for number, length in enumerate(together):
            padded.append(start + position.clamp(max=length - 1))
            place.append(at + number * rounded + position[:length])
            start += length
        while together:
            count = min(_MAX_TOGETHER, 1 << (len(together).bit_length() - 1))
            pieces.append(_Piece(at, tuple(together[:count]), rounded))
            at, together = at + count * rounded, together[count:]
    return _Layout(torch.cat(padded), torch.cat(place), tuple(pieces))


@lru_cache(maxsize=64)
def _causal_mask(length: int, sliding_window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """[1, length, length]: 0 where a position may look, else minus infinity."""
    position = torch.arange(length)
    distance = position[:, None] - position[None, :]
    allowed = (distance >= 0) & (distance < (sliding_window or length))
    return torch.zeros(1, length, length, dtype=dtype).masked_fill_(~allowed, float("-inf"))


def _key_mask(piece: _Piece, like: torch.Tensor) -> torch.Tensor:
    """[sequences, 1, length]: 0 on the tokens of a sequence, minus infinity on its padding."""
    is_padding = torch.arange(piece.length)[None] >= torch.tensor(piece.lengths)[:, None]
    return like.new_zeros(is_padding.shape).masked_fill_(is_padding, float("-inf"))[:, None]
