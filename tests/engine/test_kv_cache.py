"""Rows of the cache keep what was written while others come, go and grow, and together stay within the bound."""

from __future__ import annotations

import random

import torch

from service.engine.native.kv_cache import SHORTEST, KvCache, Row, StateShape
from service.engine.native.prefix_cache import BLOCK, PrefixCache

SHAPE = StateShape(num_layers=2, num_heads=1, head_size=4, dtype=torch.float32, device=torch.device("cpu"))


def write(row: Row, ids: list[int]) -> None:
    """Let the states of each token be its id."""
    start = row.length
    states = torch.tensor(ids, dtype=torch.float32)[None, None, None, :, None]
    row.states(start, start + len(ids))[:] = states
    row.length += len(ids)


def read(row: Row) -> list[int]:
    states = row.states(0, row.length)
    assert bool((states == states[:1, :1, :, :, :1]).all())
    return [int(id) for id in states[0, 0, 0, :, 0]]


def test_states_survive_what_happens_to_other_rows() -> None:
    draw, cache = random.Random(4), KvCache(SHAPE, max_tokens=40 * SHORTEST)
    rows: list[tuple[Row, list[int]]] = []
    for step in range(600):
        if rows and draw.random() < 0.3:
            row, ids = rows.pop(draw.randrange(len(rows)))
            assert read(row) == ids
            cache.close(row)
        elif (opened := cache.open(draw.randint(1, 300))) is not None:
            rows.append((opened, []))
        for row, ids in rows:
            new = [step] * draw.randint(0, 9)
            if cache.grow(row, len(ids) + len(new)):
                write(row, new)
                ids += new
        held = sum(row.pool.capacity for row, _ in rows)
        assert cache.num_held == held <= cache.max_tokens
        longest = max((row.pool.capacity for row, _ in rows), default=0)
        assert cache.num_allocated <= cache.max_tokens + longest, "a row that grows is in two places for a moment"
    assert all(read(row) == ids for row, ids in rows)
    for row, _ in rows:
        cache.close(row)
    assert cache.num_held == 0


def test_a_full_cache_opens_and_grows_nothing() -> None:
    cache = KvCache(SHAPE, max_tokens=3 * SHORTEST)
    first, second = cache.open(1), cache.open(SHORTEST)
    assert first is not None
    assert second is not None
    assert cache.open(SHORTEST + 1) is None
    assert not cache.grow(first, 2 * SHORTEST + 1)
    cache.close(second)
    assert cache.grow(first, 2 * SHORTEST)


def fill(prefixes: PrefixCache, cache: KvCache, ids: list[int], adapter: str) -> list[int]:
    row = cache.open(len(ids) + 1)
    assert row is not None
    prefixes.fill(row, ids, adapter)
    found = read(row)
    cache.close(row)
    return found


def keep(prefixes: PrefixCache, cache: KvCache, ids: list[int], adapter: str) -> None:
    row = cache.open(len(ids) + 1)
    assert row is not None
    write(row, ids)
    prefixes.keep(row, ids, adapter)
    cache.close(row)


def test_a_prefix_is_found_by_its_own_version_only() -> None:
    cache, prefixes = KvCache(SHAPE, max_tokens=64 * SHORTEST), PrefixCache(max_tokens=100 * BLOCK)
    ids = list(range(3 * BLOCK + 5))
    keep(prefixes, cache, ids, "version-1")
    assert fill(prefixes, cache, ids, "version-1") == ids[: 3 * BLOCK]
    assert fill(prefixes, cache, ids, "version-2") == []
    assert fill(prefixes, cache, ids, "") == []


def test_only_whole_blocks_that_begin_alike_are_found_and_a_token_is_left() -> None:
    cache, prefixes = KvCache(SHAPE, max_tokens=64 * SHORTEST), PrefixCache(max_tokens=100 * BLOCK)
    ids = list(range(2 * BLOCK))
    keep(prefixes, cache, ids, "")
    assert fill(prefixes, cache, [*ids[:-1], 999, *range(BLOCK)], "") == ids[:BLOCK]
    assert fill(prefixes, cache, [999, *ids[1:]], "") == []
    assert fill(prefixes, cache, ids, "") == ids[:BLOCK], "the logits of the last token are wanted"


def test_least_recently_used_prefixes_go_and_the_end_of_one_goes_first() -> None:
    cache, prefixes = KvCache(SHAPE, max_tokens=64 * SHORTEST), PrefixCache(max_tokens=4 * BLOCK)
    old, new = [1] * (2 * BLOCK + 1), [2] * (3 * BLOCK + 1)
    keep(prefixes, cache, old, "")
    keep(prefixes, cache, new, "")
    assert prefixes.num_tokens == 4 * BLOCK
    assert fill(prefixes, cache, new, "") == new[: 3 * BLOCK]
    assert fill(prefixes, cache, old, "") == old[:BLOCK]
