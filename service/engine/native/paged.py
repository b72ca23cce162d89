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
        self._num_pages = max_tokens // PAGE
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
            window_size=(-1, 0) if window is None else (window - 1, 0),
            enable_gqa=query.shape[1] != keys.shape[2],
            seqused_k=self.lengths,
            block_table=self.pages,
        )
        assert isinstance(attended, torch.Tensor)
        out[:num] = attended


def can_page(shape: StateShape, num_heads: int) -> bool:
    """Whether FlashAttention gives the right answer here, asked of it by a small problem in which a row of two pages is
    read as a piece and then goes on, beside a short one."""
    if shape.device.type != "cuda" or shape.dtype not in (torch.bfloat16, torch.float16):
        return False
    if shape.head_size > _MAX_HEAD_SIZE:
        return False
    try:
        error = largest_error(shape, num_heads)
    except RuntimeError as failure:
        log.warning("FlashAttention does not run here, decoding is slower without it: %s", failure)
        return False
    if error > 0.02:
        log.warning("FlashAttention is wrong by %.3f here, decoding is slower without it", error)
    return error <= 0.02


def largest_error(shape: StateShape, num_heads: int) -> float:
    """Of that problem, against plain attention in fp32."""
    generator = torch.Generator().manual_seed(0)
    one_layer = StateShape(1, shape.num_heads, shape.head_size, shape.dtype, shape.device)
    cache, worst = PagedCache(one_layer, 4 * PAGE), 0.0
    rows = [cache.open(num) for num in (PAGE + 40, 5)]
    assert all(row is not None for row in rows)
    known = [torch.empty(2, 0, shape.num_heads, shape.head_size, device=shape.device) for _ in rows]
    for nums in ((PAGE + 30, 4), (1, 1)):
        feeds = [Feed(row, [0] * num, None, True) for row, num in zip(rows, nums, strict=True)]
        sizes = (sum(nums), num_heads + 2 * shape.num_heads, shape.head_size)
        qkv = torch.randn(sizes, generator=generator).to(shape.device, shape.dtype)
        q, k, v = qkv.split([num_heads, shape.num_heads, shape.num_heads], dim=1)
        out, start = torch.empty(q.shape, dtype=q.dtype, device=q.device), 0
        Paged.of(cache, feeds).attend(out, 0, q, k, v, scale=0.2, window=None)
        for i, num in enumerate(nums):
            tokens = slice(start, start := start + num)
            known[i] = torch.cat((known[i], torch.stack((k[tokens], v[tokens])).float()), dim=1)
            expected = _plain(q[tokens].float(), known[i][0], known[i][1], scale=0.2)
            worst = max(worst, float((out[tokens].float() - expected).abs().max()))
            rows[i].length += num  # type: ignore[union-attr]
    return worst


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The last tokens of a sequence over all of it; all [tokens, heads, size]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = scale * torch.einsum("qhd,khd->hqk", q, k)
    last = torch.arange(len(k) - len(q), len(k), device=q.device)
    unseen = torch.arange(len(k), device=q.device) > last[:, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, float("-inf")).softmax(dim=-1), v)
