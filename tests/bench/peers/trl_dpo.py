"""The peer of the preference losses: one run of TRL's DPOTrainer, in the environment that `make peers` builds.

`python trl_dpo.py SETTINGS`, with SETTINGS a JSON object of the fields of `Settings`; the last line printed is a JSON
object with the loss of each optimizer step.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer


@dataclass(frozen=True)
class Settings:
    """One run over all weights in fp32; the reference is the start weights."""

    model: str  # folder
    rows: str  # JSONL of preference rows in OpenAI's shape
    output: str  # folder
    batch_size: int  # pairs
    max_length: int
    learning_rate: float
    warmup_ratio: float
    beta: float


class RecordingTrainer(DPOTrainer):
    """Keeps the loss of each step, as it is and not as it is logged."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[float] = []

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


def config(settings: Settings) -> DPOConfig:
    """The same hyperparameters and order of rows as ours; everything else as TRL has it."""
    return DPOConfig(
        output_dir=settings.output,
        loss_type="sigmoid",
        beta=settings.beta,
        bf16=False,
        max_length=settings.max_length,
        gradient_checkpointing=False,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup_ratio,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )


def row(line: str) -> dict[str, Any]:
    """A preference in TRL's words."""
    record = json.loads(line)
    chosen, rejected = record["preferred_output"], record["non_preferred_output"]
    return {"prompt": record["input"]["messages"], "chosen": chosen, "rejected": rejected}


def main() -> None:
    """Train, report."""
    settings = Settings(**json.loads(sys.argv[1]))
    with open(settings.rows) as file:
        rows = Dataset.from_list([row(line) for line in file])
    trainer = RecordingTrainer(
        model=settings.model,
        args=config(settings),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(settings.model),
    )
    trainer.train()
    print(json.dumps({"losses": trainer.losses}))


if __name__ == "__main__":
    main()
