"""Is our loop the textbook's, and TRL's? The fp32 loss of 50 steps beside theirs on the same batches.

Supervised beside a plain padded transformers loop and TRL's SFTTrainer; DPO (sigmoid, beta 0.1) beside its DPOTrainer,
over all weights and with the start weights as the reference. The peers get our rows in our order, padded, with the same
AdamW, clipping and decay, and without warm-up: transformers' begins with a step at rate 0, ours ends at the full rate.
All three mean the loss of a step the same way: over the trained tokens of the batch, or over its pairs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from tests.bench.material import MAX_LENGTH, Rows, preference_rows, write_in_order
from tests.bench.processes import train, train_peer
from training.batches import Batches
from training.examples import load_examples
from training.spec import BaseRef, DpoSpec, Hyperparameters, TrainSpec
from training.storage import Storage

GOALS = {
    "loss_curve_vs_plain": "<= 1e-4",
    "loss_curve_vs_trl": "<= 1e-4",
    "dpo_loss_curve_vs_trl": "<= 1e-4",
}
NUM_STEPS = 50
NUM_CHATS = 4  # per step
NUM_PAIRS = 2  # per step
MAX_PAIR_LENGTH = 640  # of either side; 114 of the 300 pairs are that short
SFT_RATE, DPO_RATE = 1e-3, 2.3e-5  # the second is what "auto" takes for this width
BETA = 0.1
IGNORED = -100


class LossCurves:
    """Runs of one base and what they start from; `rows` are chat rows that no other part of the benchmark needs."""

    def __init__(self, storage: Storage, folder: Path, base: BaseRef, rows: list[str]) -> None:
        self.storage, self.folder, self.base = storage, folder, base
        self.base_folder = Path(storage.path(base.key))
        self._write("chats", rows[: NUM_STEPS * NUM_CHATS])
        pairs = Rows(self.base_folder, preference_rows(), MAX_PAIR_LENGTH)
        self._write("pairs", pairs.lines[: NUM_STEPS * NUM_PAIRS])

    def figures(self) -> dict[str, float]:
        """Largest relative difference over the steps, of each comparison."""
        chats = self._spec("chats", NUM_CHATS, SFT_RATE)
        pairs = self._spec("pairs", NUM_PAIRS, DPO_RATE, method="dpo", dpo=DpoSpec(beta=BETA, gamma=0.0))
        ours, ours_dpo = self._ours(chats), self._ours(pairs)
        return {
            "loss_curve_vs_plain": largest_difference(ours, plain_losses(chats, self.storage)),
            "loss_curve_vs_trl": largest_difference(ours, self._trl(chats, "trl_sft.py", best=False, in_order=True)),
            "dpo_loss_curve_vs_trl": largest_difference(ours_dpo, self._trl(pairs, "trl_dpo.py", beta=BETA)),
        }

    def _write(self, name: str, lines: list[str]) -> None:
        path = Path(self.storage.path(f"files/{name}"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines))

    def _spec(self, name: str, batch_size: int, rate: float, **method: Any) -> TrainSpec:
        hyper = Hyperparameters(
            n_epochs=1,
            batch_size=batch_size,
            learning_rate_multiplier=1.0,
            learning_rate=rate,
            warmup_ratio=0.0,
            gradient_accumulation_steps=1,
            max_length=max(MAX_LENGTH, MAX_PAIR_LENGTH),
        )
        return TrainSpec(
            base=self.base,
            training_key=f"files/{name}",
            adapter=None,
            hyperparameters=hyper,
            precision="fp32",
            eval_interval=1000,
            checkpoint_interval=1000,
            **method,
        )

    def _ours(self, spec: TrainSpec) -> list[float]:
        steps, _ = train(spec, self.folder, f"curve_{spec.method}")
        assert len(steps) == NUM_STEPS
        return [step["train_loss"] for step in steps]

    def _trl(self, spec: TrainSpec, script: str, **others: Any) -> list[float]:
        rows, hyper = self.folder / f"{spec.method}_in_order.jsonl", spec.hyperparameters
        write_in_order(spec, self.storage, rows)
        settings = {
            "model": str(self.base_folder),
            "rows": str(rows),
            "output": str(self.folder / f"theirs_curve_{spec.method}"),
            "batch_size": hyper.batch_size,
            "max_length": hyper.max_length,
            "learning_rate": hyper.learning_rate,
            "warmup_ratio": hyper.warmup_ratio,
        }
        result, _ = train_peer(settings | others, script)
        losses: list[float] = result["losses"]
        return losses


def plain_losses(spec: TrainSpec, storage: Storage) -> list[float]:
    """Padded batches, transformers' own attention, torch's AdamW and clipping; no line of our loop.

    The batches are ours in content and order, and so is the schedule: linear decay from the first step."""
    hyper = spec.hyperparameters
    examples, _ = load_examples(spec, storage)
    batches = Batches(examples, batch_size=hyper.batch_size, n_epochs=1, seed=spec.seed)
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


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    """Relative, over the steps."""
    return max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))
