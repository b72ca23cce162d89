"""Keys and values of all running sequences, one row each, kept so that rows join and leave at any step.

All rows end at one common column, the edge: shorter rows have unused columns at their left, exactly like a left-padded
batch. So every model that can generate from a left-padded batch runs unchanged (distances between columns are distances
between tokens, also for windows and for models that mask by index). A step appends one column; buffers grow by doubling
and slide back when the edge reaches their end, so a step writes one column and copies nothing.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

_FIRST_COLUMNS = 256
_FIRST_ROWS = 4


def keys_and_values(layer: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one layer of any cache of attention states."""
    assert isinstance(layer, CacheLayerMixin)
    assert layer.keys is not None
    assert layer.values is not None
    return layer.keys, layer.values


class _Span:
    """The part of the buffers that the current forward sees, shared by all layers."""

    def __init__(self) -> None:
        self.num_rows = 0
        self.start = 0  # first column of the longest row
        self.edge = 0  # one past the last column

    @property
    def width(self) -> int:
        """Columns of the longest row."""
        return self.edge - self.start


class _RowLayer(CacheLayerMixin):
    """One layer's buffers [rows, heads, columns, head size]; created when their shape is first seen."""

    is_sliding = False

    def __init__(self, span: _Span) -> None:
        super().__init__()
        self._span = span

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the newest column and return what attention reads: views, no copies."""
        span = self._span
        assert self.keys is not None
        assert self.values is not None
        self.keys[: span.num_rows, :, span.edge - 1] = key_states[:, :, 0]
        self.values[: span.num_rows, :, span.edge - 1] = value_states[:, :, 0]
        seen = (slice(span.num_rows), slice(None), slice(span.start, span.edge))
        return self.keys[seen], self.values[seen]

    def relocate(self, like: tuple[torch.Tensor, torch.Tensor], rows: int, columns: int, start: int) -> None:
        """Make the buffers this large and let the seen columns begin at `start`. Zeros: the masked must be finite."""
        span = self._span
        for name, states in zip(("keys", "values"), like, strict=True):
            old = new = getattr(self, name)
            if old is None or (old.shape[0], old.shape[2]) != (rows, columns):
                new = states.new_zeros(rows, states.shape[1], columns, states.shape[3])
            if old is not None:
                seen = old[: span.num_rows, :, span.start : span.edge]
                new[: span.num_rows, :, start : start + span.width] = seen.clone() if new is old else seen
            setattr(self, name, new)
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._span.width, 0

    def get_seq_length(self) -> int:
        """Tokens before the newest one."""
        return self._span.width - 1

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise AssertionError("rows are written before they are read")


class RowCache(Cache):
    """The batch's cache: `rearrange` when sequences join or leave, `advance` before each forward."""

    def __init__(self, max_rows: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self._buffers: list[_RowLayer] = []  # the same objects as `layers`
        self._span = _Span()
        self._max_rows = max_rows
        self._num_rows = self._num_columns = 0  # allocated
        self.lengths = torch.zeros(max_rows, dtype=torch.long, device=device)  # tokens in each row
        self._column_numbers = torch.arange(0, device=device)

    @property
    def num_rows(self) -> int:
        """Rows that the next forward continues."""
        return self._span.num_rows

    def rearrange(
        self, moves: list[tuple[int, int]], seats: list[tuple[int, DynamicCache, int]], num_rows: int
    ) -> None:
        """Copy whole rows (from, to), then put prompts read on their own into (row, cache, length)."""
        span = self._span
        if len(seats) == num_rows:
            span.start = span.edge = 0
        if seats:
            self._make_room(seats[0][1], num_rows, max(length for _, _, length in seats))
        if moves:
            old, new = (torch.tensor(rows, device=self.lengths.device) for rows in zip(*moves, strict=True))
            self.lengths[new] = self.lengths[old]
            for layer in self._buffers:
                for buffer in keys_and_values(layer):
                    seen = buffer[:, :, span.start : span.edge]
                    seen[new] = seen[old]
        span.num_rows = num_rows
        for row, prompt, length in seats:
            self._write(row, prompt, length)
        longest = int(self.lengths[:num_rows].max()) if num_rows else 0
        span.start = span.edge - longest

    def advance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Open the next column; returns the new tokens' positions [rows, 1] and the padding mask [rows, columns]."""
        span = self._span
        if span.edge == self._num_columns:
            self._relocate(self, span.width + 1, self._num_rows, 0)
        span.edge += 1
        lengths = self.lengths[: span.num_rows]
        positions = lengths.unsqueeze(1).clone()
        lengths += 1
        mask = self._column_numbers[: span.width] >= (span.width - lengths).unsqueeze(1)
        return positions, mask

    def _write(self, row: int, prompt: DynamicCache, length: int) -> None:
        """One prompt into one row, its last token at the edge."""
        columns = slice(self._span.edge - length, self._span.edge)
        for layer, read in zip(self._buffers, prompt.layers, strict=True):
            for buffer, states in zip(keys_and_values(layer), keys_and_values(read), strict=True):
                buffer[row, :, columns] = states[0]
        self.lengths[row] = length

    def _make_room(self, like: Cache, num_rows: int, length: int) -> None:
        """Room for more rows, and for a row of `length` that ends at the edge."""
        if not self.layers:
            self._buffers = [_RowLayer(self._span) for _ in like.layers]
            self.layers = list(self._buffers)
        if num_rows <= self._num_rows and length <= self._span.edge:
            return
        rows = self._num_rows
        if num_rows > rows:
            rows = min(self._max_rows, max(_FIRST_ROWS, num_rows, 2 * rows))
        width = max(length, self._span.width)
        self._relocate(like, width + 1, rows, width - self._span.width)
        self._span.edge = max(self._span.edge, width)

    def _relocate(self, like: Cache, min_columns: int, rows: int, start: int) -> None:
        """Move the seen columns to `start`, in buffers at least twice as wide as needed, so that this stays rare."""
        columns = max(_FIRST_COLUMNS, self._num_columns)
        while columns < 2 * min_columns:
            columns *= 2
        for layer, shape in zip(self._buffers, like.layers, strict=True):
            layer.relocate(keys_and_values(shape), rows, columns, start)
        span = self._span
        span.start, span.edge = start, start + span.width
        self._num_rows, self._num_columns = rows, columns
        self._column_numbers = torch.arange(columns, device=self.lengths.device)
