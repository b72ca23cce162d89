"""Supervised fine-tuning: cross entropy of the next token, over trained tokens only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.methods.interface import LossSums, keep_examples
from training.model import kept_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from training.batches import MicroBatch
    from training.spec import TrainSpec


MEANS: tuple[str, ...] = ()
prepare = keep_examples


def loss_sums(spec: TrainSpec, model: PreTrainedModel, batch: MicroBatch) -> LossSums:
    """Counted are trained tokens; right is one whose prediction is the most likely."""
    logprobs, is_right = kept_logprobs(model, batch)
    return LossSums(-logprobs.sum(), is_right.sum(), len(batch.targets))
