"""Supervised fine-tuning: cross entropy of the next token, over trained tokens only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from training.examples import ExamplesError, load_examples
from training.failure import Failure
from training.model import kept_logits

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from training.batches import Examples, MicroBatch
    from training.spec import TrainSpec
    from training.storage import Storage


def load(spec: TrainSpec, storage: Storage, cache_dir: Path) -> tuple[Examples, Examples | None]:
    """Training and validation examples. Failure on rows that cannot be trained on (planning refuses them before)."""
    try:
        return load_examples(spec, storage, cache_dir)
    except ExamplesError as error:
        raise Failure(f"invalid_{error.param}", f"The {error.param} cannot be used: {error}", error.param) from error


def loss_sums(model: PreTrainedModel, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the losses (to differentiate) and number of tokens whose most likely prediction is right."""
    logits = kept_logits(model, batch).float()
    loss = cross_entropy(logits, batch.targets, reduction="sum")
    num_correct = (logits.detach().argmax(dim=-1) == batch.targets).sum()
    return loss, num_correct
