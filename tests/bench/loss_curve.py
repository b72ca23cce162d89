"""Is our loop the textbook's? The fp32 loss of 50 steps beside a plain padded transformers loop on the same batches."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from training.batches import Batches
from training.examples import load_examples
from training.spec import TrainSpec
from training.storage import Storage

NUM_STEPS = 50
ROWS_PER_STEP = 4
IGNORED = -100


def plain_losses(spec: TrainSpec, storage: Storage) -> list[float]:
    """Padded batches, transformers' own attention, torch's AdamW and clipping; no line of our loop.

    The batches are ours in content and order, and so is the schedule: warm-up to the peak, then linear decay."""
    hyper = spec.hyperparameters
    examples, _ = load_examples(spec, storage)
    batches = Batches(examples, batch_size=ROWS_PER_STEP, n_epochs=1, seed=spec.seed)
    folder = Path(storage.path(spec.base.key))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=float(hyper.learning_rate), weight_decay=hyper.weight_decay)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, batches.total_steps)
    losses = []
    for step in range(1, batches.total_steps + 1):
        rows = examples[batches.indices(step)]
        ids, mask, labels = _padded(rows["input_ids"], rows["trained"])
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), hyper.max_grad_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def _padded(ids: list[list[int]], trained: list[list[bool]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded ids, attention mask, and labels where a loss is taken."""
    width = max(map(len, ids))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    keep = torch.tensor([row + [False] * (width - len(row)) for row in trained])
    return padded, mask, torch.where(keep, padded, IGNORED)


def largest_difference(ours: list[float], plain: list[float]) -> float:
    """Relative, over the steps."""
    return max(abs(a - b) / b for a, b in zip(ours, plain, strict=True))
