"""Whether training has come apart while its numbers are still finite.

It is stored in checkpoints, so a resumed run decides as the uninterrupted one would; and every worker keeps the same,
because a step's loss is the same for all.
"""

from __future__ import annotations

from collections.abc import Iterable

from training.failure import Failure
from training.spec import Contract

NUM_STEPS = 20  # in a row: a spike that heals is no divergence


class LossWatch(Contract):
    """The training losses up to a step, as far as the decision needs them."""

    first: float | None = None
    num_above: int = 0  # steps in a row whose loss was far above the first

    def after(self, loss: float) -> LossWatch:
        """The watch with one more step. Far is half as much again, and at least 1: a small loss triples by chance."""
        if self.first is None:
            return LossWatch(first=loss)
        is_far = loss > self.first + max(1.0, 0.5 * abs(self.first))
        return LossWatch(first=self.first, num_above=self.num_above + 1 if is_far else 0)

    def check(self, step: int, loss: float, checkpoints: Iterable[int]) -> None:
        """Failure when training should go no further; `checkpoints` are the steps of those that are kept."""
        if self.first is None or self.num_above < NUM_STEPS:
            return
        good = [kept for kept in checkpoints if kept <= step - NUM_STEPS]
        where = f"The checkpoint of step {good[-1]} is kept. " if good else ""
        raise Failure(
            "loss_diverged",
            f"Training stopped at step {step}: the loss is {loss:.4g} and was {self.first:.4g} at the first step. "
            f"{where}Use a lower learning_rate or a longer warm-up.",
            "hyperparameters.learning_rate",
        )
