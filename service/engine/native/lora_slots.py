"""The adapters of a decoding step in tensors that stay where they are, for a CUDA graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from service.engine.native.lora import AdapterStack, LoadedAdapter, LoraPlan, Spread


@dataclass(frozen=True)
class Seats:
    """Who sits where in a stack; numbers are rounded up to powers of 2, so that few graphs serve many steps."""

    slot_of: list[int]  # of each token, 0 for none
    num_slots: int  # 0 if no token has an adapter
    size: int  # tokens of a slot
    has_gains: bool
    version: int  # of the stack

    @property
    def key(self) -> tuple[int, ...]:
        """Equal for steps that one graph can serve."""
        return (self.num_slots, self.size, self.has_gains, self.version) if self.num_slots else ()


def seats_of(stack: AdapterStack, newest: Sequence[LoadedAdapter | None]) -> Seats | None:
    """None where slots of equal size would mostly be empty: such a step is faster without a graph."""
    slot_of = stack.slots_of(newest)
    counts = Counter(slot for slot in slot_of if slot)
    if not counts:
        return Seats(slot_of, 0, 0, False, stack.version)
    num_slots, size = (1 << (num - 1).bit_length() for num in (1 + max(counts), max(counts.values())))
    if num_slots * size > 4 * len(newest) + 64:
        return None
    has_gains = any(adapter is not None and adapter.has_gains for adapter in newest)
    return Seats(slot_of, num_slots, size, has_gains, stack.version)


class Slots:
    """The plan of a step for so many tokens, whose contents `fill` changes. Tokens without an adapter are computed in
    the first slot, whose factors are zero."""

    def __init__(self, seats: Seats, num_tokens: int, device: torch.device) -> None:
        self._size = seats.size
        self._sources, self._places, self._slot_of = (
            torch.zeros(num, dtype=torch.long, device=device)
            for num in (seats.num_slots * seats.size, num_tokens, num_tokens)
        )
        spread = Spread(seats.num_slots, slice(0, num_tokens), self._sources, self._places, self._slot_of)
        self.plan = LoraPlan(spread=spread if seats.num_slots else None, has_gains=seats.has_gains)

    def fill(self, seats: Seats) -> None:
        """Let the plan be that of a step."""
        if not seats.num_slots:
            return
        sources, places = [0] * len(self._sources), [0] * len(self._places)
        filled: Counter[int] = Counter()
        for token, slot in enumerate(seats.slot_of):
            if slot:
                places[token] = slot * self._size + filled[slot]
                sources[places[token]] = token
                filled[slot] += 1
        self._sources.copy_(torch.tensor(sources))
        self._places.copy_(torch.tensor(places))
        torch.div(self._places, self._size, rounding_mode="floor", out=self._slot_of)
