"""What the evaluations of a run amount to so far: which was the best, whether the loss rises, whether to stop.

Pure bookkeeping. It is stored in every checkpoint, so a resumed run decides as the uninterrupted one would; and every
worker keeps the same, because an evaluation gives all of them the same loss.
"""

from __future__ import annotations

from training.spec import Contract, EarlyStopping

NUM_RISES = 2  # one rise may be noise


class ValidationCurve(Contract):
    """The validation losses up to a step, as far as decisions need them. An equal loss is no improvement."""

    best_step: int | None = None
    best_loss: float | None = None
    last_loss: float | None = None
    rising_since: int | None = None  # step of the last evaluation before the loss began to rise
    num_rises: int = 0  # evaluations in a row that were each worse than the one before
    warned_at: int | None = None  # step of the warning about the rise after the best evaluation
    to_beat: float | None = None  # lags behind best_loss: it moves only by min_delta or more
    num_in_vain: int = 0  # evaluations in a row that did not beat it

    def after(self, step: int, loss: float, early_stopping: EarlyStopping | None) -> ValidationCurve:
        """The curve with one more evaluation."""
        is_best = self.best_loss is None or loss < self.best_loss
        num_rises = self.num_rises + 1 if self.last_loss is not None and loss > self.last_loss else 0
        warned_at = None if is_best else self.warned_at
        if warned_at is None and num_rises >= NUM_RISES:
            warned_at = step
        min_delta = early_stopping.min_delta if early_stopping is not None else 0.0
        beats = self.to_beat is None or (loss < self.to_beat and self.to_beat - loss >= min_delta)
        return ValidationCurve(
            best_step=step if is_best else self.best_step,
            best_loss=loss if is_best else self.best_loss,
            last_loss=loss,
            rising_since=self.rising_since if num_rises else step,
            num_rises=num_rises,
            warned_at=warned_at,
            to_beat=loss if beats else self.to_beat,
            num_in_vain=0 if beats else self.num_in_vain + 1,
        )

    def has_lost_patience(self, early_stopping: EarlyStopping | None) -> bool:
        """Whether to train no further."""
        return early_stopping is not None and self.num_in_vain >= early_stopping.patience

    def warning(self, step: int) -> str | None:
        """What its owner should know after the evaluation of `step`: said once for each best checkpoint."""
        if self.warned_at != step:
            return None
        return (
            f"The validation loss rises since step {self.rising_since}; the checkpoint of step {self.best_step} is "
            "kept and will be the model unless it falls again."
        )

    def endings(self, step: int, total_steps: int, early_stopping: EarlyStopping | None) -> list[str]:
        """What to say of a run that ends after `step`: why early, and which checkpoint its model is."""
        texts = []
        if step < total_steps and early_stopping is not None:
            num, by = early_stopping.patience, f" by {early_stopping.min_delta:g}" if early_stopping.min_delta else ""
            texts.append(
                f"Stopped early at step {step}: the validation loss has not improved on {self.to_beat:.4g}{by} for "
                f"{num} evaluation{'' if num == 1 else 's'}."
            )
        if self.best_step is not None and self.best_step != step:
            texts.append(
                f"The model is the checkpoint of step {self.best_step}, whose validation loss {self.best_loss:.4g} is "
                "the lowest."
            )
        return texts
