"""A rehearsed run that waits at a chosen step until the test lets it go."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from service.jobs.rehearsal import Rehearsal
from tests.jobs.world import PATIENCE_S, World

Build = Callable[..., World]


class Gate:
    """Holds the first run that comes to the step."""

    def __init__(self, step: int) -> None:
        self.step, self.reached, self.opened = step, threading.Event(), threading.Event()

    def __call__(self, step: int) -> None:
        """Called by the rehearsal before each step."""
        if step == self.step:
            self.reached.set()
            assert self.opened.wait(PATIENCE_S)


def gated(build: Build, step: int, num_steps: int = 6, **choices: Any) -> tuple[World, Gate]:
    """A platform whose runs wait before the step; the one behind the last comes before the artifact."""
    gate = Gate(step)
    return build(make_fit=lambda storage: Rehearsal(storage, num_steps, 2, gate), **choices), gate
