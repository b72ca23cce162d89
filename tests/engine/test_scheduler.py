"""Scheduling: every sequence ends once, nobody starves, rows follow their sequences."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.native.scheduler import Scheduler


@dataclass(eq=False)
class Item:
    owner: int
    group: str
    num_left: int


class Batch:
    """Follows a scheduler like the engine does, with a list of rows for the cache."""

    def __init__(self, max_rows: int) -> None:
        self.scheduler: Scheduler[Item] = Scheduler(max_rows)
        self.rows: list[Item | None] = [None] * max_rows
        self.ended: list[Item] = []

    def step(self) -> None:
        joining = self.scheduler.joining or self.scheduler.admit()
        if joining:
            assert len({item.owner for item in joining}) == 1
            self.scheduler.join()
        if self.scheduler.has_changed:
            layout = self.scheduler.arrange()
            old = list(self.rows)
            for source, target in layout.moves:
                self.rows[target] = old[source]
            for row, item in layout.seats:
                self.rows[row] = item
            for group, rows in layout.groups:
                assert {item.group for item in self.scheduler.running[rows]} == {group}
            assert [rows.start for _, rows in layout.groups][:1] in ([], [0])
        running = list(self.scheduler.running)
        assert self.rows[: len(running)] == running, "a row does not hold its sequence"
        assert len(running) <= self.scheduler.max_batch_size
        for item in running:
            item.num_left -= 1
            if item.num_left == 0:
                self.scheduler.finish(item)
                self.ended.append(item)


Action = st.one_of(
    st.tuples(st.just("submit"), st.integers(1, 4), st.sampled_from(["", "a", "b", "c"]), st.integers(1, 6)),
    st.tuples(st.just("cancel"), st.integers(0, 30), st.just(""), st.just(0)),
    st.tuples(st.just("step"), st.integers(1, 3), st.just(""), st.just(0)),
)


@given(st.integers(1, 6), st.lists(Action, max_size=60))
@settings(deadline=None, max_examples=200)
def test_every_sequence_ends_once_and_nobody_starves(max_rows: int, actions: list[tuple[str, int, str, int]]) -> None:
    batch, items, cancelled = Batch(max_rows), [], set()
    num_owners = 0
    for action, number, group, length in actions:
        if action == "submit":
            fresh = [Item(num_owners, group, length) for _ in range(number)]
            num_owners += 1
            items += fresh
            batch.scheduler.submit(fresh)
        elif action == "cancel":
            dropped = batch.scheduler.cancel(number)
            assert all(item.owner == number for item in dropped)
            assert not set(map(id, dropped)) & set(map(id, batch.ended))
            cancelled |= set(map(id, dropped))
        else:
            for _ in range(number):
                batch.step()
    for _ in range(8 * len(items) + 1):  # at least one sequence advances per step
        batch.step()
    ended = [id(item) for item in batch.ended]
    assert len(ended) == len(set(ended))
    assert set(ended) | cancelled == {id(item) for item in items}
    assert not set(ended) & cancelled
    assert batch.scheduler.num_running == 0


def test_requests_are_served_in_the_order_they_came() -> None:
    batch = Batch(2)
    for owner in range(6):
        batch.scheduler.submit([Item(owner, "", 2)])
    while len(batch.ended) < 6:
        batch.step()
    assert [item.owner for item in batch.ended] == list(range(6))


def test_leaving_rows_move_no_more_rows_than_left() -> None:
    scheduler: Scheduler[Item] = Scheduler(8)
    items = [Item(owner, "", 9) for owner in range(8)]
    for item in items:
        scheduler.submit([item])
        scheduler.admit()
        scheduler.join()
    scheduler.arrange()
    scheduler.finish(items[1])
    scheduler.finish(items[4])
    assert len(scheduler.arrange().moves) <= 2
