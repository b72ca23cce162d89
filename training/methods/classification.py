"""Classification of texts: cross entropy over the labels, one decision per text.

Labels may weigh alike (`balanced`: a label's texts weigh in inverse proportion to their number, after King and Zeng
2001, "Logistic Regression in Rare Events Data"), or half the way there (`sqrt`: by the square root of that, as Mahajan
et al. 2018, "Exploring the Limits of Weakly Supervised Pretraining", draw labels): rare labels are found more often, at
a small price in precision. Over the training set the weights' mean is 1. Targets may be smoothed (Szegedy et al. 2016,
"Rethinking the Inception Architecture for Computer Vision", section 7). The loss is torch's `cross_entropy` with both,
but averaged over texts, not over weights: so a step's size does not depend on which labels it happens to hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch.nn.functional import cross_entropy

from training.classifier import label_logits
from training.methods.interface import LossSums, keep_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from training.batches import MicroBatch
    from training.spec import ClassificationSpec, TrainSpec

MEANS: tuple[str, ...] = ()
_POWERS = {"sqrt": 0.5, "balanced": 1.0}  # of a label's number of texts, which its weight is in inverse proportion to
prepare = keep_examples


def loss_sums(spec: TrainSpec, model: PreTrainedModel, batch: MicroBatch) -> LossSums:
    """Counted are texts; right is one whose label is the most likely."""
    assert spec.classification is not None
    assert batch.labels is not None
    logits = label_logits(model, batch).float()
    loss = cross_entropy(
        logits,
        batch.labels,
        weight=_weights(spec.classification, logits.device),
        label_smoothing=cast(float, spec.classification.label_smoothing),
        reduction="sum",
    )
    num_correct = (logits.detach().argmax(dim=-1) == batch.labels).sum()
    return LossSums(loss, num_correct, len(batch.labels), logits=logits.detach())


def _weights(settings: ClassificationSpec, device: torch.device) -> torch.Tensor | None:
    if settings.class_weights == "none":
        return None
    counts = torch.tensor(cast(tuple[int, ...], settings.label_counts), dtype=torch.float32, device=device)
    weights = counts.clamp(min=1) ** -_POWERS[settings.class_weights]
    return weights * counts.sum() / (weights * counts).sum()
