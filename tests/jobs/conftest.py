"""A platform per test, ended with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.world import PATIENCE_S, World, make_world


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Callable[..., World]]:
    """Makes platforms on one home; a second call is a restart beside the first."""
    worlds: list[World] = []

    def make(**choices: Any) -> World:
        worlds.append(make_world(tmp_path, **choices))
        return worlds[-1]

    yield make
    for world in worlds:
        assert world.launcher.join(PATIENCE_S), "a run still works"
        world.runner.close()
        world.db.close()


@pytest.fixture
def world(build: Callable[..., World]) -> World:
    """A platform whose runs are rehearsals of 4 steps."""
    return build()
