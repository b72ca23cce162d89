"""Keys and values on a GPU, in pages, and attention over them by FlashAttention, which finds the pages by a table.

All tokens of a step go through one call, newest ones and pieces of prompts alike, and nothing moves when a sequence
grows. `torch.nn.attention.varlen` says what it takes; where it does not do so on the GPU at hand, the engine runs on
pools of rows instead (`kv_cache`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.nn.attention.varlen import varlen_attn

from service.engine.native.kv_cache import StateShape
from service.engine.native.runner import Feed

log = logging.getLogger(__name__)

PAGE = 256  # tokens; FlashAttention wants multiples of it
_MAX_HEAD_SIZE = 256
_MAX_ERROR = 0.02  # of FlashAttention, relative; rounding to bf16 is 0.004


@dataclass(eq=False)
class PagedRow:
    """Where one sequence's states lie."""

    cache: PagedCache
    pages: list[int]
    length: int = 0  # tokens whose states are there

    def states(self, start: int, end: int) -> torch.Tensor:
        """[layers, 2, heads, end - start, head size]: keys and values of some tokens of one page, a view."""
        page, offset = divmod(start, PAGE)
        assert offset + end - start <= PAGE
        return self.cache.states[:, :, self.pages[page], offset : offset + end - start].transpose(2, 3)

    def slot(self, position: int) -> int:
        """Where a token's states lie, over all pages."""
        return self.pages[position // PAGE] * PAGE + position % PAGE


class PagedCache:
    """All pages. The first belongs to nobody: what is computed in vain is written there."""

    def __init__(self, shape: StateShape, max_tokens: int) -> None:
        self._num_pages = max(1, max_tokens // PAGE)
        sizes = (shape.num_layers, 2, 1 + self._num_pages, PAGE, shape.num_heads, shape.head_size)
        self.states = torch.zeros(sizes, dtype=shape.dtype, device=shape.device)
        self._free = list(range(self._num_pages, 0, -1))

    @property
    def num_held(self) -> int:
        """Tokens for which there is room in open rows."""
        return (self._num_pages - len(self._free)) * PAGE

    def open(self, num_tokens: int) -> PagedRow | None:
        """A row with room for so many tokens; None when the cache is full."""
        row = PagedRow(self, [])
        return row if self.grow(row, num_tokens) else None

    def grow(self, row: PagedRow, num_tokens: int) -> bool:
        """Make room for so many tokens in all; False when the cache is full."""
        num_more = paged_capacity(num_tokens) // PAGE - len(row.pages)
        if num_more > len(self._free):
            return False
        row.pages += [self._free.pop() for _ in range(num_more)]
        return True

    def close(self, row: PagedRow) -> None:
        """Free a row."""
        self._free += reversed(row.pages)
        row.pages = []


def paged_capacity(num_tokens: int) -> int:
    """Of the pages that so many tokens need."""
    return -(-num_tokens // PAGE) * PAGE


@dataclass(frozen=True)
class Paged:
    """All tokens of a step, sequence after sequence; a Part of its attention."""

    states: torch.Tensor  # the cache's
    slots: torch.Tensor  # int64 [tokens]: where their states go
    starts: torch.Tensor  # int32 [sequences + 1]: their first tokens in the flat row
    lengths: torch.Tensor  # int32 [sequences], of each once these tokens are read
    ends: torch.Tensor  # int32 [sequences + 1]: the sum of the lengths up to each
    pages: torch.Tensor  # int32 [sequences, most pages of any]
    max_tokens: int  # of any sequence, in this step
    max_length: int

    @classmethod
    def of(cls, cache: PagedCache, feeds: Sequence[Feed]) -> Paged:
        """What a step reads, in the order of its flat row."""
        rows: list[PagedRow] = [feed.place for feed in feeds]
        nums = [len(feed.token_ids) for feed in feeds]
        lengths = [row.length + num for row, num in zip(rows, nums, strict=True)]
        slots = [row.slot(at) for row, end in zip(rows, lengths, strict=True) for at in range(row.length, end)]
        most = max(len(row.pages) for row in rows)
        pages = [row.pages + [0] * (most - len(row.pages)) for row in rows]
        device = cache.states.device
        starts, totals, of_each, table = (
            torch.tensor(values, dtype=torch.int32, device=device)
            for values in ([0, *accumulate(nums)], [0, *accumulate(lengths)], lengths, pages)
        )
        at = torch.tensor(slots, device=device)
        return cls(cache.states, at, starts, of_each, totals, table, max(nums), max(lengths))

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
        keys, values = self.states[layer]  # [pages, PAGE, heads, head size]
        num = len(self.slots)
        # Single queries see all of their keys, which need not be said; then those of one key head are taken together.
        # Splitting the keys is right only then: over pages, torch 2.13 else mixes up the sequences (pytorch#194167).
        is_single = self.max_tokens == 1 and window is None
        are_grouped = is_single and query.shape[1] > keys.shape[2]
        keys.flatten(0, 1).index_copy_(0, self.slots, key[:num])
        values.flatten(0, 1).index_copy_(0, self.slots, value[:num])
        attended = varlen_attn(
            query[:num].contiguous(),
            keys,
            values,
            self.starts,
            self.ends,
            self.max_tokens,
            self.max_length,
            scale=scale,
            window_size=(-1, -1) if is_single else (-1, 0) if window is None else (window - 1, 0),
            enable_gqa=query.shape[1] != keys.shape[2],
            seqused_k=self.lengths,
            block_table=self.pages,
            num_splits=None if are_grouped else 1,
        )
        assert isinstance(attended, torch.Tensor)
        out[:num] = attended


def can_page(shape: StateShape, num_heads: int) -> bool:
    """Whether FlashAttention gives the right answer here, asked of it by a small problem."""
    if shape.device.type != "cuda" or shape.dtype not in (torch.bfloat16, torch.float16):
        return False
    if shape.head_size > _MAX_HEAD_SIZE:
        return False
    try:
        error = largest_error(shape, num_heads)
    except RuntimeError as failure:
        log.warning("FlashAttention does not run here, decoding is slower without it: %s", failure)
        return False
    is_right = error <= _MAX_ERROR  # not so of what is no number
    if not is_right:
        log.warning("FlashAttention is wrong by %.3f here, decoding is slower without it", error)
    return is_right


def largest_error(shape: StateShape, num_heads: int) -> float:
    """Of a small problem, against plain attention in fp32, relative to the length of a head's output: a long row and a
    short one are read as pieces and then go on by single tokens, the last of them with a window."""
    generator = torch.Generator().manual_seed(0)
    one_layer = StateShape(1, shape.num_heads, shape.head_size, shape.dtype, shape.device)
    cache = PagedCache(one_layer, 8 * PAGE)
    rows = [cache.open(num) for num in (5 * PAGE, 5)]
    known = [torch.empty(2, 0, shape.num_heads, shape.head_size, device=shape.device) for _ in rows]
    errors = []
    for nums, window in (((4 * PAGE + 30, 2), None), ((1, 1), None), ((1, 1), PAGE + 7)):
        feeds = [Feed(row, [0] * num, None, True) for row, num in zip(rows, nums, strict=True)]
        sizes = (sum(nums), num_heads + 2 * shape.num_heads, shape.head_size)
        qkv = torch.randn(sizes, generator=generator).to(shape.device, shape.dtype)
        q, k, v = qkv.split([num_heads, shape.num_heads, shape.num_heads], dim=1)
        out, start = torch.empty(q.shape, dtype=q.dtype, device=q.device), 0
        Paged.of(cache, feeds).attend(out, 0, q, k, v, scale=0.2, window=window)
        for i, num in enumerate(nums):
            tokens = slice(start, start := start + num)
            known[i] = torch.cat((known[i], torch.stack((k[tokens], v[tokens])).float()), dim=1)
            expected = _plain(q[tokens].float(), known[i][0], known[i][1], scale=0.2, window=window)
            errors.append(((out[tokens].float() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())
            rows[i].length += num  # type: ignore[union-attr]
    return float(torch.stack(errors).max())


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, window: int | None) -> torch.Tensor:
    """The last tokens of a sequence over all of it; all [tokens, heads, size]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = scale * torch.einsum("qhd,khd->hqk", q, k)
    last = torch.arange(len(k) - len(q), len(k), device=q.device)
    distance = last[:, None] - torch.arange(len(k), device=q.device)
    unseen = (distance < 0) | (distance >= (window or len(k)))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, float("-inf")).softmax(dim=-1), v)
