"""Deltas are grouped by time and nothing of them is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from service.engine.protocol import Delta, TokenLogprob
from service.serving.coalesce import coalesce, merge


def test_merging_joins_text_and_counts_per_choice() -> None:
    deltas = [Delta(1, "a", 1), Delta(0, "x", 1), Delta(1, "b", 2, "stop"), Delta(0, "", 1)]
    assert merge(deltas) == [Delta(1, "ab", 3, "stop"), Delta(0, "x", 2)]


def test_merging_keeps_logprobs_in_order_and_the_cached_tokens_of_the_first() -> None:
    a, b, c = (TokenLogprob(token, token.encode(), -1.0, (), at) for at, token in enumerate("abc"))
    deltas = [Delta(0, "a", 1, logprobs=(a,), num_cached_tokens=7), Delta(0, "bc", 2, "stop", (b, c))]
    assert merge(deltas) == [Delta(0, "abc", 3, "stop", (a, b, c), 7)]


async def test_the_first_delta_leaves_at_once_and_later_ones_together() -> None:
    async def source() -> AsyncGenerator[list[Delta], None]:
        for number in range(4):
            yield [Delta(0, str(number), 1)]
            if number == 0:
                await first_seen.wait()
        yield [Delta(0, "", 0, "stop")]

    first_seen = asyncio.Event()
    groups = []
    async for group in coalesce(source(), lambda: 60.0):  # a minute that nobody waits: the end of the source flushes
        groups.append(group)
        first_seen.set()
    assert groups == [[Delta(0, "0", 1)], [Delta(0, "123", 3, "stop")]]


async def test_an_error_comes_after_the_output_before_it() -> None:
    async def source() -> AsyncGenerator[list[Delta], None]:
        yield [Delta(0, "a", 1)]
        raise RuntimeError("broken")

    groups = coalesce(source(), lambda: 0.0)
    assert await anext(groups) == [Delta(0, "a", 1)]
    with pytest.raises(RuntimeError, match="broken"):
        await anext(groups)


async def test_closing_closes_the_source() -> None:
    closed = asyncio.Event()

    async def source() -> AsyncGenerator[list[Delta], None]:
        try:
            yield [Delta(0, "a", 1)]
            await asyncio.Event().wait()
        finally:
            closed.set()

    async with aclosing(coalesce(source(), lambda: 0.0)) as groups:
        await anext(groups)
    assert closed.is_set()
