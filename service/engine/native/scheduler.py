"""Who reads how many tokens in the next step. Pure: no torch, no threads, no clocks.

First come, first served. Sequences that are generating read their newest token in every step, so no prompt stalls them
for longer than the tokens that a step may read. When the cache is full, the youngest sequence gives its place up and
waits at the front of the line, with what it has generated: the oldest always goes on, so nobody starves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar


class Schedulable(Protocol):
    """What the scheduler must know of a sequence."""

    place: Any  # set by `open`; None while it has none

    @property
    def owner(self) -> Hashable:
        """Its request; sequences of one request are cancelled together."""
        ...

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        ...

    @property
    def is_reading(self) -> bool:
        """Whether it has not yet read its prompt."""
        ...


S = TypeVar("S", bound=Schedulable)


class Room(Protocol[S]):  # type: ignore[misc]  # S is only taken
    """Places for sequences."""

    def open(self, sequence: S) -> bool:
        """Give it a place; False when there is none."""
        ...

    def grow(self, sequence: S) -> bool:
        """Make room for all its tokens; False when there is none."""
        ...

    def close(self, sequence: S) -> None:
        """Take its place away."""
        ...


@dataclass
class Scheduler(Generic[S]):
    """The waiting line and the sequences with a place."""

    room: Room[S]
    max_batch_size: int
    max_prompt_tokens: int  # of prompts in one step
    waiting: deque[S] = field(default_factory=deque)
    running: list[S] = field(default_factory=list)  # oldest first
    num_preempted: int = 0  # times that a sequence gave its place up

    def submit(self, sequences: list[S]) -> None:
        """Join the end of the line."""
        self.waiting.extend(sequences)

    def finish(self, sequence: S) -> None:
        """A running sequence has ended."""
        self.running.remove(sequence)
        self.room.close(sequence)

    def cancel(self, owner: Hashable) -> None:
        """Drop every sequence of a request, wherever it is."""
        self.waiting = deque(sequence for sequence in self.waiting if sequence.owner != owner)
        for sequence in [sequence for sequence in self.running if sequence.owner == owner]:
            self.finish(sequence)

    def plan(self) -> list[tuple[S, int]]:
        """Each sequence that reads in the next step, and how many tokens; the order is that of `running`."""
        self._make_room()
        self._admit()
        budget, step = self.max_prompt_tokens, []
        for sequence in self.running:
            num_unread = sequence.num_tokens - sequence.place.length
            if num_unread > 1 or sequence.is_reading:
                num_unread = min(num_unread, budget)
                budget -= num_unread
            if num_unread:
                step.append((sequence, num_unread))
        return step

    def _make_room(self) -> None:
        """Let every running sequence grow by its newest token, at the cost of the youngest ones."""
        for sequence in list(self.running):
            while sequence in self.running and not self.room.grow(sequence):
                youngest = self.running.pop()
                self.room.close(youngest)
                self.num_preempted += 1
                self.waiting.appendleft(youngest)

    def _admit(self) -> None:
        """Let in who can read in this step. Choices of one prompt wait until the first of them has read it."""
        num_unread = sum(s.num_tokens - s.place.length for s in self.running if s.is_reading)
        reading = {sequence.owner for sequence in self.running if sequence.is_reading}
        while self.waiting and len(self.running) < self.max_batch_size and num_unread < self.max_prompt_tokens:
            sequence = self.waiting[0]
            if sequence.owner in reading or not self.room.open(sequence):
                return
            self.running.append(self.waiting.popleft())
            num_unread += sequence.num_tokens - sequence.place.length
            reading.add(sequence.owner)
