"""Supervised fine-tuning: cross entropy of the next token, over trained tokens only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import cross_entropy

from training.methods.interface import LossSums, keep_examples
from training.model import kept_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from training.batches import MicroBatch
    from training.spec import TrainSpec


MEANS: tuple[str, ...] = ()
prepare = keep_examples


def loss_sums(spec: TrainSpec, model: PreTrainedModel, batch: MicroBatch) -> LossSums:
    """Counted are trained tokens; right is one whose prediction is the most likely."""
    logits = kept_logits(model, batch).float()
    loss = cross_entropy(logits, batch.targets, reduction="sum")
    num_correct = (logits.detach().argmax(dim=-1) == batch.targets).sum()
    return LossSums(loss, num_correct, len(batch.targets))
