"""Loss and accuracy over the whole validation set, shared among the workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from training.batches import Examples, MicroBatch, collate
from training.failure import check_flag, is_out_of_memory
from training.parallel import Workers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LossSums = Callable[["PreTrainedModel", MicroBatch], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over the trained tokens of the validation set."""

    loss: float
    accuracy: float


def evaluate(
    model: PreTrainedModel, loss_sums: LossSums, examples: Examples, workers: Workers, micro_batch_size: int
) -> Evaluation:
    """Validate without touching gradients or random state; every worker gets the same result."""
    sums = torch.zeros(4, device=workers.device)  # loss, correct, tokens, workers out of memory
    mine = range(workers.rank, len(examples), workers.size)
    model.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(mine), micro_batch_size):
                batch = collate(examples[list(mine[start : start + micro_batch_size])]).to(workers.device)
                loss, num_correct = loss_sums(model, batch)
                sums += torch.stack([loss, num_correct, torch.tensor(len(batch.targets)), torch.tensor(0)]).to(sums)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sums[3] += 1
    finally:
        model.train()
    workers.sum_(sums)
    loss_sum, correct_sum, num_tokens, out_of_memory = sums.tolist()
    check_flag(out_of_memory)
    return Evaluation(loss_sum / max(num_tokens, 1), correct_sum / max(num_tokens, 1))
