"""Which adapters are resident: loads off the hot path, least recently used out first, never one that is in use.

Lives on the asyncio side. A running sequence holds its adapter by reference, so dropping one here pulls nothing from
under a step.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from service.engine.protocol import AdapterMismatch, AdapterRef

A = TypeVar("A")


@dataclass(eq=False)
class _Entry(Generic[A]):
    loading: asyncio.Task[A]
    num_in_flight: int = 0


class Residency(Generic[A]):
    """At most `max_resident` adapters. `acquire` and `release` frame every use."""

    def __init__(self, max_resident: int, load: Callable[[AdapterRef], A]) -> None:
        """`load` runs in a thread."""
        self._max_resident = max_resident
        self._load = load
        self._entries: OrderedDict[str, _Entry[A]] = OrderedDict()  # least recently used first
        self._line = asyncio.Lock()  # first come, first served: a busy adapter cannot keep others out for ever
        self._freed = asyncio.Event()
        self.num_loads = 0
        self.load_s: deque[float] = deque(maxlen=32)

    @property
    def resident(self) -> tuple[str, ...]:
        """Ids of the loaded adapters, least recently used first."""
        return tuple(id for id, entry in self._entries.items() if entry.loading.done())

    async def acquire(self, ref: AdapterRef) -> A:
        """The adapter, loaded if need be; it stays until `release`. AdapterMismatch if it cannot run here."""
        if self._max_resident < 1:
            raise AdapterMismatch("this engine was started without room for adapters")
        async with self._line:
            while (entry := self._entries.get(ref.id)) is None and not self._make_room():
                self._freed.clear()
                await self._freed.wait()
            if entry is None:
                entry = self._entries[ref.id] = _Entry(asyncio.create_task(self._timed_load(ref)))
            self._entries.move_to_end(ref.id)
            entry.num_in_flight += 1
        try:
            return await asyncio.shield(entry.loading)  # others may wait for the same load
        except BaseException:
            self._release(entry)
            raise

    def release(self, ref: AdapterRef) -> None:
        """One use has ended."""
        if (entry := self._entries.get(ref.id)) is not None:  # absent only after `clear`
            self._release(entry)

    def clear(self) -> None:
        """Forget all adapters."""
        self._entries.clear()

    def _release(self, entry: _Entry[A]) -> None:
        entry.num_in_flight -= 1
        assert entry.num_in_flight >= 0
        self._freed.set()

    def _make_room(self) -> bool:
        """Whether there is room for one more, after evicting the least recently used idle adapter if need be."""
        if len(self._entries) < self._max_resident:
            return True
        for id, entry in self._entries.items():
            if entry.num_in_flight == 0 and entry.loading.done():
                del self._entries[id]
                return True
        return False

    async def _timed_load(self, ref: AdapterRef) -> A:
        started = time.perf_counter()
        try:
            adapter = await asyncio.to_thread(self._load, ref)
        except BaseException:
            self._entries.pop(ref.id, None)  # the next request tries again
            self._freed.set()
            raise
        self.num_loads += 1
        self.load_s.append(time.perf_counter() - started)
        return adapter
