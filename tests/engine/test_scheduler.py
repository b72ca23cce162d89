"""Scheduling over the real cache: every sequence ends once, nobody starves, no place leaks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.native.kv_cache import KvCache, Row, StateShape, row_capacity
from service.engine.native.scheduler import Scheduler

SHAPE = StateShape(num_layers=1, num_heads=1, head_size=1, dtype=torch.float32, device=torch.device("cpu"))
MOST_TOKENS = 300  # of one sequence
PROMPT_TOKENS = 64  # read in one step


@dataclass(eq=False)
class Item:
    """A sequence whose tokens are only counted."""

    owner: int
    num_prompt: int
    num_left: int
    num_tokens: int = 0
    place: Row | None = None
    has_ended: bool = False

    def __post_init__(self) -> None:
        self.num_tokens = self.num_prompt

    @property
    def is_reading(self) -> bool:
        assert self.place is not None
        return self.place.length < self.num_prompt


class Room:
    """Places in a real cache."""

    def __init__(self, cache: KvCache) -> None:
        self.cache = cache

    def open(self, item: Item) -> bool:
        item.place = self.cache.open(item.num_tokens + 1)
        return item.place is not None

    def grow(self, item: Item) -> bool:
        assert item.place is not None
        return self.cache.grow(item.place, item.num_tokens)

    def close(self, item: Item) -> None:
        assert item.place is not None
        self.cache.close(item.place)
        item.place = None


class Engine:
    """Steps a scheduler as the stepper does. The state of token i of a sequence is its owner's number plus i."""

    def __init__(self, max_batch_size: int, max_tokens: int) -> None:
        self.cache = KvCache(SHAPE, max_tokens)
        self.scheduler: Scheduler[Item] = Scheduler(Room(self.cache), max_batch_size, PROMPT_TOKENS)
        self.max_batch_size = max_batch_size

    def step(self) -> None:
        plan = self.scheduler.plan()
        assert plan or not (self.scheduler.waiting or self.scheduler.running), "nobody goes on"
        assert len(self.scheduler.running) <= self.max_batch_size
        assert sum(num for item, num in plan if num > 1) <= PROMPT_TOKENS
        assert self.cache.num_held <= self.cache.max_tokens
        assert {item for item, _ in plan} >= {item for item in self.scheduler.running if not item.is_reading}
        for item, num in plan:
            row = item.place
            assert row is not None
            assert row.length + num <= min(item.num_tokens, row.pool.capacity)
            seen = row.states(0, row.length)[0, 0, 0, :, 0]
            assert torch.equal(seen, item.owner + torch.arange(row.length, dtype=torch.float32)), "another's states"
            states = item.owner + torch.arange(row.length, row.length + num, dtype=torch.float32)
            row.states(row.length, row.length + num)[:] = states[:, None]
            row.length += num
        for item, _ in plan:
            if item.place is not None and item.place.length == item.num_tokens:
                assert not item.has_ended
                item.num_tokens += 1
                item.num_left -= 1
                if not item.num_left:
                    item.has_ended = True
                    self.scheduler.finish(item)


events = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 4), st.integers(1, 200), st.integers(1, 100)),
        st.tuples(st.just("cancel"), st.integers(0, 10), st.just(0), st.just(0)),
        st.tuples(st.just("step"), st.integers(1, 40), st.just(0), st.just(0)),
    ),
    max_size=25,
)


@given(events, st.integers(1, 6), st.integers(row_capacity(MOST_TOKENS), 2000))
@settings(max_examples=60, deadline=None)
def test_random_arrivals_and_cancels_leave_nothing_behind(
    script: list[tuple[str, int, int, int]], max_batch_size: int, max_tokens: int
) -> None:
    engine, items, cancelled = Engine(max_batch_size, max_tokens), [], set()
    for owner, (kind, number, num_prompt, num_left) in enumerate(script):
        if kind == "submit":
            new = [Item(1000 * (owner + 1), num_prompt, num_left) for _ in range(number)]
            items += new
            engine.scheduler.submit(new)
        elif kind == "cancel" and items:
            owners = items[number % len(items)].owner
            cancelled.add(owners)
            engine.scheduler.cancel(owners)
        elif kind == "step":
            for _ in range(number):
                engine.step()
    bound = sum(item.num_left + item.num_prompt for item in items) * 8 + 10
    while engine.scheduler.waiting or engine.scheduler.running:
        engine.step()
        bound -= 1
        assert bound > 0, "it never ends"
    assert engine.cache.num_held == 0
    for item in items:
        assert item.has_ended or item.owner in cancelled


def test_the_oldest_goes_on_when_the_cache_is_full() -> None:
    engine = Engine(max_batch_size=4, max_tokens=512)
    old, young = Item(1000, 100, 200), Item(2000, 100, 200)
    engine.scheduler.submit([old])
    engine.step()
    engine.scheduler.submit([young])
    while not old.has_ended:
        engine.step()
    assert engine.scheduler.num_preempted > 0
    assert not young.has_ended
    while not young.has_ended:
        engine.step()
    assert engine.cache.num_held == 0
