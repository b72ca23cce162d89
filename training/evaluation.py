"""Loss and accuracy over the whole validation set, shared among the workers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from training.batches import Examples, collate
from training.classification_metrics import report
from training.failure import check_flag, is_out_of_memory
from training.methods.interface import LossSumsOf
from training.parallel import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over what the method counts in the validation set: trained tokens, pairs, texts, or anchors."""

    loss: float
    accuracy: float
    report: dict[str, Any] | None = None  # of a classifier, see `training.classification_metrics`


def evaluate(
    model: PreTrainedModel,
    loss_sums: LossSumsOf,
    examples: Examples,
    workers: Workers,
    micro_batch_size: int,
    labels: tuple[str, ...] = (),
) -> Evaluation:
    """Validate without touching gradients or random state; every worker gets the same result. A classifier's
    labels are given for the report."""
    sums = torch.zeros(4, device=workers.device)  # loss, correct, count, workers out of memory
    logits = torch.zeros(len(examples), len(labels), device=workers.device)
    mine = range(workers.rank, len(examples), workers.size)
    model.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(mine), micro_batch_size):
                indices = list(mine[start : start + micro_batch_size])
                found = loss_sums(model, collate(examples[indices]).to(workers.device))
                if found.logits is not None:
                    logits[indices] = found.logits
                sums += torch.stack(
                    [found.loss, found.num_correct, torch.tensor(found.num_counted), torch.tensor(0)]
                ).to(sums)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sums[3] += 1
    finally:
        model.train()
    workers.sum_(sums)
    if labels:
        workers.sum_(logits)
    loss_sum, correct_sum, count, out_of_memory = sums.tolist()
    check_flag(out_of_memory)
    made = None
    if labels and math.isfinite(loss_sum):
        truth = examples[list(range(len(examples)))]["label"]
        made = report(logits.double().cpu().numpy(), np.asarray(truth), labels)
    return Evaluation(loss_sum / max(count, 1), correct_sum / max(count, 1), made)
