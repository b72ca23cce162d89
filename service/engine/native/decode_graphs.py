"""Decoding steps on a GPU as CUDA graphs: one launch instead of a thousand, whose starts take longer than their work.

A graph is captured for each size of batch and of its tables of pages and adapters, rounded up, when a step meets them
for the second time. It reads its inputs from one tensor that a step fills, and the adapters' places from `lora_slots`.
What it says is compared once, when it is captured, with the same step without it. Steps that read prompts, or want more
than the newest logits, run without graphs.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from service.engine.native.flat_attention import AttentionPlan
from service.engine.native.lora import AdapterStack
from service.engine.native.lora_slots import Seats, Slots, seats_of
from service.engine.native.paged import PAGE, Paged, PagedCache
from service.engine.native.runner import Feed

log = logging.getLogger(__name__)

Run = Callable[[torch.Tensor, torch.Tensor, AttentionPlan], torch.Tensor]  # logits of token ids and positions [tokens]

_MAX_GRAPHS = 64  # least recently used ones go first
_MAX_ERROR = 0.05  # of logits by a graph, relative to the largest: its products may add up in another order
_NUM_FIXED = 4  # rows of a step's inputs before the pages: token ids, positions, slots, lengths


@dataclass(frozen=True)
class _Graph:
    inputs: torch.Tensor  # int64 [4 + most pages, tokens]
    slots: list[Slots]  # of each stack
    replay: Callable[[], None]
    logits: torch.Tensor


class DecodeGraphs:
    """The graphs of one model."""

    def __init__(self, run: Run, cache: PagedCache, stacks: Sequence[AdapterStack]) -> None:
        self._run, self._cache, self._stacks = run, cache, stacks
        self._device = cache.states.device
        self._record = Recorder()
        self._graphs: OrderedDict[tuple[object, ...], _Graph] = OrderedDict()
        self._last_new: tuple[object, ...] | None = None  # the last key without a graph
        self._is_working = True

    def __call__(self, feeds: Sequence[Feed]) -> torch.Tensor | None:
        """Logits [feeds, vocabulary], which hold until the next call; None if this step has to run without a graph."""
        if not self._is_working or any(len(f.token_ids) > 1 or not f.ends or f.scores is not None for f in feeds):
            return None
        of_each = (seats_of(stack, [feed.adapter for feed in feeds]) for stack in self._stacks)
        seats = [seat for seat in of_each if seat is not None]
        if len(seats) < len(self._stacks):
            return None
        inputs = _inputs_of(feeds)
        key = (*inputs.shape, *(seat.key for seat in seats))
        if key not in self._graphs:
            is_new, self._last_new = key != self._last_new, key
            if is_new or not self._add(key, inputs, seats):
                return None
        self._graphs.move_to_end(key)
        graph = self._graphs[key]
        self._fill(graph.inputs, graph.slots, inputs, seats)
        graph.replay()
        return graph.logits[: len(feeds)]

    def _add(self, key: tuple[object, ...], inputs: torch.Tensor, seats: list[Seats]) -> bool:
        """Capture a graph by its first step; False, and no graph ever again, if that does not work."""
        try:
            graph, error = self._capture(inputs, seats)
            self._is_working = error <= _MAX_ERROR  # not so of what is no number
            if not self._is_working:
                log.warning("a CUDA graph is wrong by %.3f, decoding is slower without", error)
        except RuntimeError as failure:
            log.warning("CUDA graphs do not work for this model, decoding is slower without: %s", failure)
            self._is_working = False
        if not self._is_working:
            return False
        self._graphs[key] = graph
        if len(self._graphs) > _MAX_GRAPHS:
            self._graphs.popitem(last=False)
        return True

    def _capture(self, inputs: torch.Tensor, seats: list[Seats]) -> tuple[_Graph, float]:
        """A graph, and by how much its logits differ from those without."""
        own = torch.zeros_like(inputs, device=self._device)
        slots = [Slots(seat, inputs.shape[1], self._device) for seat in seats]
        self._fill(own, slots, inputs, seats)
        expected, logits, replay = self._record(lambda: self._logits(own))
        replay()
        error = (logits - expected).abs().max() / expected.abs().max()
        return _Graph(own, slots, replay, logits), float(error)

    def _fill(self, own: torch.Tensor, slots: list[Slots], inputs: torch.Tensor, seats: list[Seats]) -> None:
        own.copy_(inputs)
        for stack, of_stack, seat in zip(self._stacks, slots, seats, strict=True):
            of_stack.fill(seat)
            stack.plan = of_stack.plan

    def _logits(self, inputs: torch.Tensor) -> torch.Tensor:
        token_ids, positions, slots, lengths = inputs[:_NUM_FIXED]
        num_pages, num_tokens = len(inputs) - _NUM_FIXED, inputs.shape[1]
        ends = torch.zeros(num_tokens + 1, dtype=torch.int32, device=self._device)
        ends[1:] = lengths.cumsum(0)
        part = Paged(
            states=self._cache.states,
            slots=slots,
            starts=torch.arange(num_tokens + 1, dtype=torch.int32, device=self._device),
            lengths=lengths.int(),
            ends=ends,
            pages=inputs[_NUM_FIXED:].T.int().contiguous(),
            max_tokens=1,
            max_length=num_pages * PAGE,
        )
        return self._run(token_ids, positions, AttentionPlan([part]))


def _inputs_of(feeds: Sequence[Feed]) -> torch.Tensor:
    """What a graph reads, on the CPU. Tokens are rounded up to a power of 2, pages to one of 4; what is behind the
    feeds reads and writes the page that belongs to nobody."""
    rows = [feed.place for feed in feeds]
    num_tokens = 1 << (len(rows) - 1).bit_length()
    num_pages = 4 ** ((max(len(row.pages) for row in rows) - 1).bit_length() + 1 >> 1)
    inputs = np.zeros((_NUM_FIXED + num_pages, num_tokens), dtype=np.int64)
    inputs[3] = 1
    inputs[0, : len(rows)] = [feed.token_ids[0] for feed in feeds]
    inputs[1, : len(rows)] = [row.length for row in rows]
    inputs[2, : len(rows)] = [row.slot(row.length) for row in rows]
    inputs[3, : len(rows)] = [row.length + 1 for row in rows]
    for number, row in enumerate(rows):
        inputs[_NUM_FIXED : _NUM_FIXED + len(row.pages), number] = row.pages
    return torch.from_numpy(inputs)


class Recorder:
    """Captures graphs, one at a time, all in the same memory: no two of them run at once, and what one says is used
    before the next one runs."""

    def __init__(self) -> None:
        self._side = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, Callable[[], None]]:
        """What a function says without a graph, which a capture wants to have been done before; then by the graph, in
        the place where each call of the third computes it anew."""
        current = torch.cuda.current_stream()
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            expected = run()
        current.wait_stream(self._side)
        graph = torch.cuda.CUDAGraph()
        # A thread that loads an adapter meanwhile does no harm; and a capture that fails leaves its stream behind.
        with (
            torch.cuda.stream(current),
            torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"),
        ):
            result = run()
        return expected, result, graph.replay
