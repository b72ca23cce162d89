"""Who runs next: the waiting line, the rows of the batch, and which rows move when sequences join or leave.

Pure: no torch, no threads, no clocks. First come, first served; a running sequence is never set back: nobody starves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Schedulable(Protocol):
    """What the scheduler must know of a sequence."""

    @property
    def owner(self) -> Hashable:
        """Its request; sequences of one request may share a prefill, and are cancelled together."""
        ...

    @property
    def group(self) -> str:
        """Its adapter ("" for the base model); rows of one group lie side by side in the batch."""
        ...


S = TypeVar("S", bound=Schedulable)


@dataclass(frozen=True, slots=True)
class Layout(Generic[S]):
    """How the batch changes before the next forward."""

    moves: list[tuple[int, int]]  # row contents (from, to); all are read before any is written
    seats: list[tuple[int, S]]  # rows of the sequences that join, written after the moves
    groups: list[tuple[str, slice]]  # rows of each group, in row order


@dataclass
class Scheduler(Generic[S]):
    """Rows 0..n-1 of the batch are `running`; `joining` holds the sequences whose prompt is being read."""

    max_batch_size: int
    waiting: deque[S] = field(default_factory=deque)
    joining: list[S] = field(default_factory=list)
    running: list[S] = field(default_factory=list)  # in row order, as of the last `arrange`
    _joined: list[S] = field(default_factory=list)  # read, without a row yet
    _left: set[int] = field(default_factory=set)  # rows freed since the last `arrange`

    def submit(self, sequences: list[S]) -> None:
        """Join the end of the line."""
        self.waiting.extend(sequences)

    def admit(self) -> list[S]:
        """The next sequences to prefill together (one prompt), as far as there are free rows; empty if none."""
        assert not self.joining, "one prompt is read at a time"
        num_free = self.max_batch_size - self.num_running
        while self.waiting and len(self.joining) < num_free:
            if self.joining and self.waiting[0].owner != self.joining[0].owner:
                break
            self.joining.append(self.waiting.popleft())
        return list(self.joining)

    @property
    def num_running(self) -> int:
        """Sequences that hold a row or are about to."""
        return len(self.running) - len(self._left) + len(self._joined) + len(self.joining)

    def join(self) -> None:
        """The prompt has been read: its sequences get rows at the next `arrange`."""
        self._joined.extend(self.joining)
        self.joining.clear()

    def finish(self, sequence: S) -> None:
        """A sequence with a row, or joined and about to get one, has ended."""
        if sequence in self._joined:
            self._joined.remove(sequence)
        else:
            self._left.add(self.running.index(sequence))

    def cancel(self, owner: Hashable) -> list[S]:
        """Drop every sequence of a request, wherever it is; returns them."""
        dropped = [s for s in self.waiting if s.owner == owner]
        if dropped:
            self.waiting = deque(s for s in self.waiting if s.owner != owner)
        for place in (self.joining, self._joined):
            dropped += [s for s in place if s.owner == owner]
            place[:] = [s for s in place if s.owner != owner]
        rows = [row for row, s in enumerate(self.running) if s.owner == owner and row not in self._left]
        self._left.update(rows)
        return dropped + [self.running[row] for row in rows]

    @property
    def has_changed(self) -> bool:
        """Whether `arrange` has something to do."""
        return bool(self._left or self._joined)

    def arrange(self) -> Layout[S]:
        """Close the gaps and seat the joined sequences: groups side by side, as few rows moved as possible."""
        old_row = {id(s): row for row, s in enumerate(self.running) if row not in self._left}
        stay = [s for row, s in enumerate(self.running) if row not in self._left] + self._joined
        members: dict[str, list[S]] = {}
        for sequence in stay:
            members.setdefault(sequence.group, []).append(sequence)
        self.running, groups = [], []
        for group in sorted(members):
            rows = slice(len(self.running), len(self.running) + len(members[group]))
            groups.append((group, rows))
            self.running += self._seat(members[group], old_row, rows)
        self._joined, self._left = [], set()
        new_row = {id(s): row for row, s in enumerate(self.running)}
        moves = [(old, new_row[key]) for key, old in old_row.items() if new_row[key] != old]
        seats = [(row, s) for row, s in enumerate(self.running) if id(s) not in old_row]
        return Layout(moves, seats, groups)

    @staticmethod
    def _seat(members: list[S], old_row: dict[int, int], rows: slice) -> list[S]:
        """One group in row order: who already sits within the group's rows keeps the row, the others fill the gaps."""
        kept = {row: s for s in members if rows.start <= (row := old_row.get(id(s), -1)) < rows.stop}
        others = iter([s for s in members if old_row.get(id(s), -1) not in kept])
        return [kept[row] if row in kept else next(others) for row in range(rows.start, rows.stop)]
