"""Loss and accuracy over the whole validation set, shared among the workers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from training.batches import Examples, collate
from training.classification_metrics import report
from training.failure import check_flag
from training.fsdp import can_be_told
from training.methods.interface import LossSumsOf
from training.parallel import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over what the method counts in the validation set: trained tokens, pairs, texts, or anchors."""

    loss: float
    accuracy: float
    means: dict[str, float] = field(default_factory=dict)  # what the method reports beside them
    report: dict[str, Any] | None = None  # of a classifier, see `training.classification_metrics`


def evaluate(
    model: PreTrainedModel,
    loss_sums: LossSumsOf,
    examples: Examples,
    workers: Workers,
    micro_batch_size: int,
    means: tuple[str, ...] = (),
    labels: tuple[str, ...] = (),
) -> Evaluation:
    """Validate without touching gradients or random state; every worker gets the same result. `means` are the names of
    the method's own numbers, if they are wanted; a classifier's labels are given for the report."""
    sums = torch.zeros(4 + len(means), device=workers.device)  # loss, correct, count, workers out of memory, means
    logits = torch.zeros(len(examples), len(labels), device=workers.device)
    model.eval()
    try:
        with torch.inference_mode():
            for indices in workers.passes(len(examples), micro_batch_size):
                found = loss_sums(model, collate(examples[indices or [0]]).to(workers.device))
                if not indices:
                    continue
                sums[0] += found.loss
                sums[1] += found.num_correct
                sums[2] += found.num_counted
                if means:
                    assert found.others is not None
                    sums[4:] += found.others
                if found.logits is not None:
                    logits[indices] = found.logits.to(logits)
    except (RuntimeError, MemoryError) as error:
        if not can_be_told(error, model):
            raise
        sums[3] += 1
    finally:
        model.train()
    workers.sum_(sums)
    loss_sum, correct_sum, count, out_of_memory, *others = sums.tolist()
    check_flag(out_of_memory)
    made = None
    if labels:
        workers.sum_(logits)
        if math.isfinite(loss_sum):
            truth = examples[list(range(len(examples)))]["label"]
            made = report(logits.double().cpu().numpy(), np.asarray(truth), labels)
    count = max(count, 1)
    own = {name: total / count for name, total in zip(means, others, strict=True)}
    return Evaluation(loss_sum / count, correct_sum / count, own, made)
