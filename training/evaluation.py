"""Loss and accuracy over the whole validation set, shared among the workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from training.batches import Examples, collate
from training.failure import check_flag, is_out_of_memory
from training.methods.interface import LossSumsOf
from training.parallel import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over what the method counts in the validation set: trained tokens, or pairs."""

    loss: float
    accuracy: float


def evaluate(
    model: PreTrainedModel, loss_sums: LossSumsOf, examples: Examples, workers: Workers, micro_batch_size: int
) -> Evaluation:
    """Validate without touching gradients or random state; every worker gets the same result."""
    sums = torch.zeros(4, device=workers.device)  # loss, correct, count, workers out of memory
    mine = range(workers.rank, len(examples), workers.size)
    model.eval()
    try:
        with torch.inference_mode():
            # As many passes as the first worker, which has the most: sharded weights need all workers in each.
            for start in range(0, len(range(0, len(examples), workers.size)), micro_batch_size):
                indices = list(mine[start : start + micro_batch_size])
                found = loss_sums(model, collate(examples[indices or [0]]).to(workers.device))
                if not indices:
                    continue
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
    loss_sum, correct_sum, count, out_of_memory = sums.tolist()
    check_flag(out_of_memory)
    return Evaluation(loss_sum / max(count, 1), correct_sum / max(count, 1))
