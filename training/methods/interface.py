"""What a method is: a module with what `Method` lists. Examples come to all of them from `training.examples`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from training.batches import Examples, MicroBatch
    from training.parallel import Workers
    from training.spec import TrainSpec


class LossSums(NamedTuple):
    """Sums over one micro-batch. Added over micro-batches and workers, then divided by all that was counted."""

    loss: torch.Tensor  # to differentiate
    num_correct: torch.Tensor  # right ones among what is counted
    num_counted: int  # trained tokens, pairs of answers, texts, or anchors
    others: torch.Tensor | None = None  # [len(MEANS)], in their order
    logits: torch.Tensor | None = None  # [examples, labels] where a report is made of them


LossSumsOf = Callable[["PreTrainedModel", "MicroBatch"], LossSums]


def keep_examples(
    spec: TrainSpec, model: PreTrainedModel, examples: Examples, workers: Workers, micro_batch_size: int
) -> Examples:
    """The `prepare` of a method that need not know the start weights."""
    return examples


class Method(Protocol):
    """A module of this package."""

    MEANS: tuple[str, ...]  # what it reports beside loss and accuracy, each a mean over what is counted

    def prepare(
        self, spec: TrainSpec, model: PreTrainedModel, examples: Examples, workers: Workers, micro_batch_size: int
    ) -> Examples:
        """The examples with what the method must know of the start weights, which `model` holds when this is called.
        All workers call it together."""
        ...

    def loss_sums(self, spec: TrainSpec, model: PreTrainedModel, batch: MicroBatch) -> LossSums:
        """The loss over a micro-batch."""
        ...
