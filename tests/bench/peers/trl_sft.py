"""The peer of the training benchmarks: one run of TRL's SFTTrainer, in the environment that `make peers` builds.

`python trl_sft.py SETTINGS`, with SETTINGS a JSON object of the fields of `Settings`; the last line printed is a JSON
object with the loss of each optimizer step, the time after it, and the tokens that it was trained on: those with a
loss, and all.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

IGNORED = -100


@dataclass(frozen=True)
class Settings:
    """One run."""

    model: str  # folder
    rows: str  # JSONL of chat rows
    output: str  # folder for the trained model
    best: bool  # packing and bf16; else padded and fp32, TRL's usual start
    batch_size: int  # rows; packed ones of max_length in mode best
    max_length: int
    learning_rate: float
    warmup_ratio: float = 0.05
    in_order: bool = False  # rows as they stand in the file; else as TRL shuffles them
    lora_rank: int = 0  # 0 trains all weights
    lora_alpha: float = 32.0
    accumulation: int = 1  # micro-batches that a batch is made of
    gradient_checkpointing: bool = False
    max_steps: int = -1  # -1: one epoch
    use_cpu: bool = True
    model_options: dict[str, Any] = field(default_factory=dict)  # of from_pretrained


class CountingTrainer(SFTTrainer):
    """Adds up micro-batches: the loss, the labels that it is taken over, and all tokens but padding."""

    loss: float | torch.Tensor = 0.0
    num_tokens = 0
    num_all_tokens = 0

    def training_step(self, model, inputs, *args, **kwargs):
        self.num_tokens += int((inputs["labels"][:, 1:] != IGNORED).sum())
        mask = inputs.get("attention_mask")  # rows that are flattened into one have none, and no padding
        self.num_all_tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.loss = self.loss + loss  # its share of the step's mean over tokens with a loss
        return loss


class Clock(TrainerCallback):
    """Loss, time and tokens at the end of each optimizer step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.at: list[float] = []
        self.num_tokens: list[int] = []
        self.num_all_tokens: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        if not args.use_cpu:
            torch.cuda.synchronize()
        self.at.append(time.time())
        loss, self.trainer.loss = self.trainer.loss, 0.0
        self.losses.append(float(loss))
        total, self.trainer.num_tokens = self.trainer.num_tokens, 0
        self.num_tokens.append(total)
        total, self.trainer.num_all_tokens = self.trainer.num_all_tokens, 0
        self.num_all_tokens.append(total)


def config(settings: Settings) -> SFTConfig:
    """The same hyperparameters as ours; everything else as TRL has it."""
    return SFTConfig(
        output_dir=settings.output,
        packing=settings.best,
        bf16=settings.best,
        max_length=settings.max_length,
        assistant_only_loss=True,
        gradient_checkpointing=settings.gradient_checkpointing,
        per_device_train_batch_size=settings.batch_size // settings.accumulation,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=settings.warmup_ratio,
        train_sampling_strategy="sequential" if settings.in_order else "random",
        num_train_epochs=1,
        max_steps=settings.max_steps,
        save_strategy="no",
        report_to="none",
        use_cpu=settings.use_cpu,
        model_init_kwargs=settings.model_options,
        disable_tqdm=True,
    )


def main() -> None:
    """Train, save, report."""
    settings = Settings(**json.loads(sys.argv[1]))
    with open(settings.rows) as file:
        rows = Dataset.from_list([json.loads(line) for line in file])
    rank = settings.lora_rank
    lora = LoraConfig(r=rank, lora_alpha=settings.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    clock = Clock()
    clock.trainer = CountingTrainer(
        model=settings.model,
        args=config(settings),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(settings.model),
        peft_config=lora if rank else None,
        callbacks=[clock],
    )
    clock.trainer.train()
    clock.trainer.save_model(settings.output)
    result = {"losses": clock.losses, "at": clock.at}
    print(json.dumps(result | {"num_tokens": clock.num_tokens, "num_all_tokens": clock.num_all_tokens}))


if __name__ == "__main__":
    main()
