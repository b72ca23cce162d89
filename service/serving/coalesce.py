"""Group a stream's deltas by time, so that a hop carries what several engine steps produced.

The first delta leaves at once, later ones at most every so many seconds: no token waits longer than that, and a stream
slower than that never waits at all. Owns no clock but the event loop's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from service.engine.protocol import Delta

Deltas = AsyncGenerator[list[Delta], None]


def merge(deltas: list[Delta]) -> list[Delta]:
    """One delta per choice, choices in order of their first appearance."""
    by_index: dict[int, Delta] = {}
    for delta in deltas:
        before = by_index.get(delta.index)
        by_index[delta.index] = delta if before is None else _join(before, delta)
    return list(by_index.values())


def _join(a: Delta, b: Delta) -> Delta:
    assert a.finish_reason is None, "output after the end of a choice"
    return Delta(
        a.index,
        a.text + b.text,
        a.num_tokens + b.num_tokens,
        b.finish_reason,
        a.logprobs + b.logprobs,
        a.num_cached_tokens + b.num_cached_tokens,
    )


async def coalesce(source: Deltas, pause_s: Callable[[], float]) -> Deltas:
    """The source's deltas in groups, after each of them the pause that holds then. Closing this closes the source; what
    the source raises comes after its output."""
    inbox = _Inbox()
    pump = asyncio.create_task(inbox.fill(source))
    try:
        next_at = 0.0
        while not inbox.is_drained:
            await inbox.changed.wait()
            delay_s = next_at - asyncio.get_running_loop().time()
            if delay_s > 0:
                await asyncio.wait({pump}, timeout=delay_s)  # ends early when the source does
            group = inbox.take()
            next_at = asyncio.get_running_loop().time() + pause_s()
            if group:
                yield merge(group)
        await pump  # raises what the source raised
    finally:
        if not pump.done():
            pump.cancel()
            await asyncio.wait({pump})
        if not pump.cancelled():
            pump.exception()  # marks it as seen: the consumer has it, or has gone
        await source.aclose()


class _Inbox:
    """Deltas on their way from the pump to the consumer."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self._deltas: list[Delta] = []
        self._has_ended = False

    @property
    def is_drained(self) -> bool:
        """Whether nothing is left and nothing will come."""
        return self._has_ended and not self._deltas

    async def fill(self, source: Deltas) -> None:
        """Take all that the source gives."""
        try:
            async for deltas in source:
                self._deltas += deltas
                self.changed.set()
        finally:
            self._has_ended = True
            self.changed.set()

    def take(self) -> list[Delta]:
        """Everything so far."""
        deltas, self._deltas = self._deltas, []
        if not self._has_ended:
            self.changed.clear()
        return deltas
