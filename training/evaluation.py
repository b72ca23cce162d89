"""Loss and accuracy over the whole validation set, shared among the workers."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    means: dict[str, float] = field(default_factory=dict)  # what the method reports beside them


def evaluate(
    model: PreTrainedModel,
    loss_sums: LossSumsOf,
    examples: Examples,
    workers: Workers,
    micro_batch_size: int,
    means: tuple[str, ...] = (),
) -> Evaluation:
    """Validate without touching gradients or random state; every worker gets the same result. `means` are the names of
    the method's own numbers, if they are wanted."""
    sums = torch.zeros(4 + len(means), device=workers.device)  # loss, correct, count, workers out of memory, means
    mine = range(workers.rank, len(examples), workers.size)
    model.eval()
    try:
        with torch.inference_mode():
            for start in range(0, len(mine), micro_batch_size):
                batch = collate(examples[list(mine[start : start + micro_batch_size])]).to(workers.device)
                found = loss_sums(model, batch)
                sums[0] += found.loss
                sums[1] += found.num_correct
                sums[2] += found.num_counted
                if means:
                    assert found.others is not None
                    sums[4:] += found.others
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sums[3] += 1
    finally:
        model.train()
    workers.sum_(sums)
    loss_sum, correct_sum, count, out_of_memory, *others = sums.tolist()
    check_flag(out_of_memory)
    count = max(count, 1)
    return Evaluation(
        loss_sum / count, correct_sum / count, {name: x / count for name, x in zip(means, others, strict=True)}
    )
