"""A real small model on real rows: stories3M after one epoch of alpaca rows, all weights, beside TRL's SFTTrainer.

Ours plans what is on "auto" (batch size, learning rate, fp32); TRL gets the same numbers, the same batches in the same
order, padded. Each side warms up its own way: transformers begins with a step at rate 0 and reaches the full rate one
step later than ours. About 900 of the 999 rows train and 100 validate.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.bench.material import MAX_LENGTH, Rows, alpaca_rows, copy_base, write_in_order
from tests.bench.processes import train, train_peer
from tests.bench.validation import valid_loss
from tests.shared import MODELS
from training.plan import plan
from training.spec import BaseRef, Hyperparameters, TrainSpec
from training.storage import Storage

GOALS = {"stories3m_valid_loss_vs_trl": "<= 1"}
NUM_VALID_ROWS = 100


def compare(storage: Storage, folder: Path) -> dict[str, float]:
    """Both sides' mean loss over the trained tokens of rows that neither has seen, and the ratio."""
    base = copy_base(storage, MODELS / "stories3M")
    alpaca = alpaca_rows()
    random.Random(0).shuffle(alpaca)
    rows = Rows(Path(storage.path(base.key)), alpaca)
    rows.write(Path(storage.path("files/stories_valid")), 0, NUM_VALID_ROWS)
    rows.write(Path(storage.path("files/stories")), NUM_VALID_ROWS, len(rows.lines))
    spec = _spec(base, storage)
    train(spec, folder, "stories")
    settings = _peer_settings(spec, storage, folder)
    train_peer(settings)
    valid = spec.model_copy(update={"training_key": "files/stories_valid"})
    ours, theirs, before = (
        valid_loss(valid, storage, model)
        for model in (folder / "runs/stories/artifact", Path(settings["output"]), Path(settings["model"]))
    )
    return {
        "stories3m_valid_loss_vs_trl": ours / theirs,
        "stories3m_valid_loss": ours,
        "stories3m_trl_valid_loss": theirs,
        "stories3m_valid_loss_before": before,
    }


def _spec(base: BaseRef, storage: Storage) -> TrainSpec:
    """One epoch, all weights, and numbers in place of every "auto"."""
    hyper = Hyperparameters(n_epochs=1, max_length=MAX_LENGTH)
    spec = TrainSpec(base=base, training_key="files/stories", adapter=None, hyperparameters=hyper)
    return plan(spec, storage).spec


def _peer_settings(spec: TrainSpec, storage: Storage, folder: Path) -> dict[str, Any]:
    assert spec.precision == "fp32"
    rows, hyper = folder / "stories_in_order.jsonl", spec.hyperparameters
    write_in_order(spec, storage, rows)
    return {
        "model": storage.path(spec.base.key),
        "rows": str(rows),
        "output": str(folder / "theirs" / "stories"),
        "best": False,
        "batch_size": hyper.batch_size,
        "accumulation": hyper.gradient_accumulation_steps,
        "max_length": MAX_LENGTH,
        "learning_rate": hyper.learning_rate,
        "warmup_ratio": hyper.warmup_ratio,
        "in_order": True,
    }
