"""The fast path: one forward pass over a flat row of tokens, whatever they are: the newest token of each running
sequence, and pieces of prompts. See `flat_attention`, `kv_cache` and `lora` for how each token finds its own, and
`paged` and `decode_graphs` for what is different on a GPU."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from transformers import PreTrainedModel

from service.engine.native.cpu_kernels import kernels_for
from service.engine.native.decode_graphs import DecodeGraphs
from service.engine.native.flat_attention import FLAT, AttentionPlan, Newest, Part, Piece, Scattered, Whole, rounded
from service.engine.native.fused_layers import fuse
from service.engine.native.kv_cache import KvCache, Pool, Row, StateShape, row_capacity
from service.engine.native.linear import fuse_head, fuse_single, linear_layers
from service.engine.native.lora import AdapterStack, LoadedAdapter
from service.engine.native.lora import Piece as LoraPiece
from service.engine.native.paged import Paged, PagedCache, PagedRow, can_page, paged_capacity
from service.engine.native.prefix_cache import PrefixCache
from service.engine.native.runner import Feed, context_of

# Model types whose every layer mixes tokens only through the attention interface, plain or with a sliding window, and
# keeps keys and values of one shape. A test compares each with `generate`.
FLAT_MODEL_TYPES = frozenset(
    {
        *("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma3_text", "phi", "phi3", "granite", "olmo"),
        *("olmo2", "starcoder2", "gpt_neox", "cohere"),
    }
)
_MEMORY_SHARE = {"cpu": 1 / 4, "cuda": 3 / 4}  # of the memory that is free after loading, for keys and values
_PREFIX_SHARE = 1 / 4  # of the cache, beside it
_CHANGING_ROPE = ("dynamic", "longrope")  # whose angles depend on the longest sequence, which a graph cannot ask for
_NUM_QUERIES = 128  # of a piece at a time
# Tokens of a piece times keys, from which it is faster to take its tokens together than one by one: by matrix products,
# or by the kernel for that.
_MANY_SCORES, _MANY_SCORES_OF_KERNEL = 8192, 2048


class FlatRunner:
    """A decoder and the cache of its sequences."""

    reads_in_pieces = True

    def __init__(
        self, model: PreTrainedModel, *, max_rows: int, with_adapters: bool, max_cache_tokens: int | None
    ) -> None:
        """`max_cache_tokens` bounds the cache; without it, the memory that is free."""
        config = model.config.get_text_config()
        self.device = model.device
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        self.max_context = context_of(model)
        self._model = model
        num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = StateShape(config.num_hidden_layers, num_heads, size, model.dtype, self.device)
        is_paged = can_page(shape, config.num_attention_heads)
        self._stack, self._head_stack = (AdapterStack(model, keeps_first_empty=is_paged) for _ in range(2))
        model.set_attn_implementation(FLAT)
        fuse(model, self._stack)
        fuse_head(model, self._head_stack)
        fuse_single(model, self._stack)
        self.layers = linear_layers(model) if with_adapters else {}
        kernels = kernels_for(torch.empty(0, dtype=model.dtype, device=self.device))
        can_attend = kernels is not None and kernels.can_attend(config.num_attention_heads, num_heads, size)
        self._kernels = kernels if can_attend else None
        self._has_piece_kernel = self._kernels is not None and self._kernels.can_attend_piece(size)
        self._many_scores = _MANY_SCORES_OF_KERNEL if self._has_piece_kernel else _MANY_SCORES
        capacity_for = paged_capacity if is_paged else row_capacity
        max_tokens = max_cache_tokens or min(
            max_rows * capacity_for(self.max_context), int(_free_bytes(self.device) // shape.token_bytes)
        )
        self._graphs: DecodeGraphs | None = None
        self.cache: KvCache | PagedCache
        if is_paged:
            self.cache = PagedCache(shape, max_tokens)
            if not any(kind in str(getattr(config, "rope_parameters", "")) for kind in _CHANGING_ROPE):
                self._graphs = DecodeGraphs(self._newest_logits, self.cache, (self._stack, self._head_stack))
        else:
            self.cache = KvCache(shape, max_tokens)
        self.prefixes = PrefixCache(int(_PREFIX_SHARE * max_tokens))
        while capacity_for(self.max_context) > max(max_tokens, capacity_for(1)):
            self.max_context = capacity_for(self.max_context) // 2

    def open(self, token_ids: Sequence[int], adapter: LoadedAdapter | None, *, anew: bool) -> Row | PagedRow | None:
        """See Runner."""
        row: Row | PagedRow | None = self.cache.open(len(token_ids) + 1)
        if row is not None and not anew:
            self.prefixes.fill(row, token_ids, _id(adapter))
        return row

    def grow(self, place: Any, num_tokens: int) -> bool:
        """See Runner."""
        return self.cache.grow(place, num_tokens)

    def keep(self, place: Any, token_ids: Sequence[int], adapter: LoadedAdapter | None) -> None:
        """See Runner."""
        self.prefixes.keep(place, token_ids, _id(adapter))

    def close(self, place: Any) -> None:
        """See Runner."""
        self.cache.close(place)

    def forward(self, feeds: Sequence[Feed]) -> torch.Tensor:
        """See Runner."""
        logits = self._graphs(feeds) if self._graphs is not None else None
        if logits is None:
            logits = self._read(feeds)
        for feed in feeds:
            feed.place.length += len(feed.token_ids)
        num_ends, start = sum(feed.ends for feed in feeds), 0
        for feed in feeds:
            if feed.scores is not None:
                first = num_ends + start
                feed.scores.add(logits[first : first + len(feed.token_ids)])
                start += len(feed.token_ids)
        return logits[:num_ends].float()

    def _read(self, feeds: Sequence[Feed]) -> torch.Tensor:
        """Logits after the last tokens of feeds that end, then of all tokens of those that are scored."""
        newest = [feed for feed in feeds if len(feed.token_ids) == 1]
        if isinstance(self.cache, KvCache):
            newest.sort(key=lambda feed: (feed.place.pool.capacity, feed.place.number))
        pieces = [feed for feed in feeds if len(feed.token_ids) > 1]
        token_ids: list[int] = []
        positions: list[int] = []
        tokens: dict[int, slice] = {}
        for feed in (*newest, *pieces):
            tokens[id(feed)] = slice(len(token_ids), len(token_ids) + len(feed.token_ids))
            token_ids += feed.token_ids
            positions += range(feed.place.length, feed.place.length + len(feed.token_ids))
        padding = [0] * (_rounded_tokens(len(token_ids)) - len(token_ids))
        plan = AttentionPlan(self._parts(newest, pieces, tokens))
        adapted = [LoraPiece(tokens[id(feed)], feed.adapter) for feed in pieces if feed.adapter is not None]
        self._stack.set_plan([feed.adapter for feed in newest], adapted)
        adapters = [feed.adapter for feed in feeds if feed.ends]
        adapters += [feed.adapter for feed in feeds if feed.scores is not None for _ in feed.token_ids]
        self._head_stack.set_plan(adapters, [])
        kept = [tokens[id(feed)].stop - 1 for feed in feeds if feed.ends]
        scored = [feed for feed in feeds if feed.scores is not None]
        kept += [number for feed in scored for number in range(len(token_ids))[tokens[id(feed)]]]
        kept += [0] * (_rounded_tokens(max(1, len(kept))) - len(kept))
        return self._logits(
            torch.tensor(token_ids + padding, device=self.device),
            torch.tensor(positions + padding, device=self.device),
            torch.tensor(kept, device=self.device),
            plan,
        )

    def _logits(
        self, token_ids: torch.Tensor, positions: torch.Tensor, kept: torch.Tensor, plan: AttentionPlan
    ) -> torch.Tensor:
        """[kept, vocabulary] of token ids and positions [tokens], after the tokens whose numbers are kept."""
        logits: torch.Tensor = self._model(
            input_ids=token_ids[None],
            position_ids=positions[None],
            logits_to_keep=kept,
            use_cache=False,
            plan=plan,
        ).logits[0]
        return logits

    def _newest_logits(self, token_ids: torch.Tensor, positions: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        """After each token."""
        return self._logits(token_ids, positions, torch.arange(len(token_ids), device=self.device), plan)

    def _parts(self, newest: list[Feed], pieces: list[Feed], tokens: dict[int, slice]) -> list[Part]:
        """Who attends how; `tokens` says where in the flat row each feed lies."""
        if isinstance(self.cache, PagedCache):
            return [Paged.of(self.cache, [*newest, *pieces])]
        if self._kernels is None:
            return [*self._newest(newest), *self._pieces(pieces, tokens)]
        long = [feed for feed in pieces if len(feed.token_ids) * _end(feed) > self._many_scores]
        short = [*newest, *(feed for feed in pieces if len(feed.token_ids) * _end(feed) <= self._many_scores)]
        which: defaultdict[Pool, list[tuple[int, int, int]]] = defaultdict(list)
        for feed in short:
            row: Row = feed.place
            span = tokens[id(feed)]
            which[row.pool] += [
                (number, row.number, position)
                for number, position in zip(range(span.start, span.stop), range(row.length, _end(feed)), strict=True)
            ]
        scattered = [Scattered(self._kernels, pool, torch.tensor(of).T.contiguous()) for pool, of in which.items()]
        return [*scattered, *self._pieces(long, tokens)]

    def _pieces(self, feeds: list[Feed], tokens: dict[int, slice]) -> Iterator[Part]:
        """On a CPU without kernel in parts whose scores stay near the processor; a part's tokens see no later ones."""
        for feed in feeds:
            if self._has_piece_kernel:
                assert self._kernels is not None
                yield Whole(self._kernels, feed.place, feed.place.length, tokens[id(feed)])
                continue
            span, most = tokens[id(feed)], _NUM_QUERIES if self.device.type == "cpu" else len(feed.token_ids)
            for start in range(span.start, span.stop, most):
                num_before = feed.place.length + start - span.start
                yield Piece(feed.place, num_before, slice(start, min(start + most, span.stop)))

    def _newest(self, feeds: list[Feed]) -> list[Newest]:
        parts, start = [], 0
        for _, group in groupby(feeds, key=lambda feed: feed.place.pool.capacity):
            rows: list[Row] = [feed.place for feed in group]
            part = Newest(
                pool=rows[0].pool,
                rows=torch.tensor([row.number for row in rows], device=self.device),
                positions=torch.tensor([row.length for row in rows], device=self.device),
                tokens=slice(start, start + len(rows)),
                num_rows=rows[-1].number + 1,
                num_keys=min(rounded(1 + max(row.length for row in rows)), rows[0].pool.capacity),
            )
            start += len(rows)
            parts.append(part)
        return parts


def _end(feed: Feed) -> int:
    """Tokens of its sequence once it is read."""
    return int(feed.place.length) + len(feed.token_ids)


def _id(adapter: LoadedAdapter | None) -> str:
    return adapter.id if adapter is not None else ""


def _rounded_tokens(num: int) -> int:
    """One of few sizes, for the products; finer than for attention, of which they are the larger part."""
    if num <= 8 or num > 256:
        return num if num <= 8 else rounded(num)
    multiple = 8 if num <= 128 else 16
    return -(-num // multiple) * multiple


def _free_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        free: Any = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return _MEMORY_SHARE.get(device.type, 1 / 4) * float(free)
