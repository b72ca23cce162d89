"""Keys and values of all sequences on the fast path, and how many more fit.

A sequence's states lie in one row of a pool, and the rows of a pool have one capacity; capacities double from pool to
pool, so a row is at least half full but in the shortest pool, and a sequence that outgrows its row moves to the next
pool. The rows in use are the first ones of their pool: one matrix product over a view serves them all, without a
gather through block tables, which on a CPU costs more than the product itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SHORTEST = 128  # tokens in a row of the first pool
_FEWEST_ROWS = 4


@dataclass(frozen=True)
class StateShape:
    """What one token keeps."""

    num_layers: int
    num_heads: int  # of keys and values
    head_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values of one token, all layers together."""
        return 2 * self.num_layers * self.num_heads * self.head_size * self.dtype.itemsize


@dataclass(eq=False)
class Row:
    """Where one sequence's states lie."""

    pool: Pool
    number: int  # in the pool; changes when another row closes
    length: int = 0  # tokens whose states are there

    def states(self, start: int, end: int) -> torch.Tensor:
        """[layers, 2, heads, end - start, head size]: keys and values of some tokens, a view."""
        return self.pool.states[:, :, self.number, :, start:end]


class Pool:
    """Rows of one capacity."""

    def __init__(self, shape: StateShape, capacity: int) -> None:
        self.capacity = capacity
        self.rows: list[Row] = []  # the open ones
        self._shape = shape
        self._num_touched = 0  # rows, the first ones, that hold finite numbers, used or not
        self.states = self._allocate(0)

    def _allocate(self, num_rows: int) -> torch.Tensor:
        """[layers, 2, rows, heads, capacity, head size]; memory that nobody has touched costs nothing yet."""
        s = self._shape
        sizes = (s.num_layers, 2, num_rows, s.num_heads, self.capacity, s.head_size)
        return torch.empty(sizes, dtype=s.dtype, device=s.device)

    @property
    def num_rows(self) -> int:
        """For which there is memory."""
        return self.states.shape[2]

    def add(self) -> Row:
        """One more row, where there is memory for it."""
        row = Row(self, len(self.rows))
        assert row.number < self.num_rows
        if row.number == self._num_touched:  # what is masked is read, and must be finite
            self.states[:, :, row.number] = 0
            self._num_touched += 1
        self.rows.append(row)
        return row

    def remove(self, row: Row) -> None:
        """Close a row; the last one takes its place."""
        last = self.rows.pop()
        if last is not row:
            self.states[:, :, row.number, :, : last.length] = last.states(0, last.length)
            last.number = row.number
            self.rows[row.number] = last

    def resize(self, num_rows: int) -> None:
        """Take memory for so many rows, at least the open ones."""
        states, kept = self._allocate(num_rows), len(self.rows)
        states[:, :, :kept] = self.states[:, :, :kept]
        self.states, self._num_touched = states, kept


class KvCache:
    """All pools, and the bound on what they hold together."""

    def __init__(self, shape: StateShape, max_tokens: int) -> None:
        """`max_tokens` bounds the capacities of all rows together, and the memory that is taken for them."""
        self.shape, self.max_tokens = shape, max_tokens
        self.num_held = 0  # tokens for which there is room in open rows
        self._pools: dict[int, Pool] = {}

    @property
    def num_allocated(self) -> int:
        """Tokens for which there is memory. It is kept for the next sequences until a longer row needs it."""
        return sum(pool.num_rows * pool.capacity for pool in self._pools.values())

    def open(self, num_tokens: int) -> Row | None:
        """A row with room for so many tokens; None when the cache is full."""
        capacity = row_capacity(num_tokens)
        if self.num_held + capacity > self.max_tokens:
            return None
        self.num_held += capacity
        return self._add(capacity)

    def grow(self, row: Row, num_tokens: int) -> bool:
        """Make room for so many tokens in all, in a longer row if need be; False when the cache is full."""
        if num_tokens <= row.pool.capacity:
            return True
        capacity = row_capacity(num_tokens)
        if self.num_held + capacity - row.pool.capacity > self.max_tokens:
            return False
        longer = self._add(capacity, num_alike=len(row.pool.rows))
        longer.states(0, row.length).copy_(row.states(0, row.length))
        self.num_held += capacity - row.pool.capacity
        row.pool.remove(row)
        row.pool, row.number = longer.pool, longer.number
        row.pool.rows[row.number] = row
        return True

    def close(self, row: Row) -> None:
        """Free a row."""
        self.num_held -= row.pool.capacity
        row.pool.remove(row)

    def _add(self, capacity: int, num_alike: int = 0) -> Row:
        """A new row; `num_alike` more may follow soon, as sequences of one length grow together."""
        if capacity not in self._pools:
            self._pools[capacity] = Pool(self.shape, capacity)
        pool = self._pools[capacity]
        if len(pool.rows) == pool.num_rows:
            wanted = max(_FEWEST_ROWS, 2 * pool.num_rows, pool.num_rows + num_alike)
            if self.num_allocated + (wanted - pool.num_rows) * capacity > self.max_tokens:
                for other in self._pools.values():
                    if other.num_rows > len(other.rows):
                        other.resize(len(other.rows))
            num_free = (self.max_tokens - self.num_allocated) // capacity
            pool.resize(pool.num_rows + max(1, min(num_free, wanted - pool.num_rows)))
        return pool.add()


def row_capacity(num_tokens: int) -> int:
    """Of the shortest row with room for so many tokens."""
    return max(SHORTEST, 1 << (num_tokens - 1).bit_length())
