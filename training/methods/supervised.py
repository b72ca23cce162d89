"""Supervised fine-tuning: cross entropy of the next token, over trained tokens only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from training.model import kept_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from training.batches import Examples, MicroBatch
    from training.spec import TrainSpec
    from training.storage import Storage


def load(spec: TrainSpec, storage: Storage) -> tuple[Examples, Examples | None]:
    """Training and validation examples."""
    from training.plan import load_examples

    return load_examples(spec, storage)


def loss_sums(model: PreTrainedModel, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the losses (to differentiate) and number of tokens whose most likely prediction is right."""
    logits = kept_logits(model, batch).float()
    loss = cross_entropy(logits, batch.targets, reduction="sum")
    num_correct = (logits.detach().argmax(dim=-1) == batch.targets).sum()
    return loss, num_correct
