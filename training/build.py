"""What a run trains: the model with the head and the adapter that its spec asks for, and the trainer of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from training import fsdp
from training.classifier import load_classifier
from training.embedder import load_embedder
from training.lora import inject, load_adapter
from training.model import load_model
from training.optim import Trainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from training.parallel import Workers
    from training.spec import TrainSpec


def build(
    spec: TrainSpec, base_folder: Path, start_folder: Path | None, num_sums: int, workers: Workers
) -> tuple[PreTrainedModel, Trainer | fsdp.ShardedTrainer]:
    """Model and trainer, on this worker's device. Frozen weights are held in the compute dtype; trained ones have fp32
    masters in the trainer, which start from the exact stored weights."""
    dtype = torch.bfloat16 if spec.precision == "bf16" else torch.float32
    loaded, compute = (dtype, None) if spec.adapter is not None else (torch.float32, dtype)
    if spec.parallel == "fsdp":
        model = build_model(spec, base_folder, start_folder, loaded, torch.device("cpu"))
        return model, fsdp.make_trainer(model, spec.hyperparameters, num_sums, compute, workers)
    model = build_model(spec, base_folder, start_folder, loaded, workers.device)
    return model, Trainer(model, spec.hyperparameters, num_sums, compute)


def build_model(
    spec: TrainSpec, base_folder: Path, start_folder: Path | None, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The model that the spec trains, with the head of its method and with its adapter: its weights are the base's, or
    those of the earlier fine-tune in `start_folder`."""
    folder = start_folder if start_folder is not None and spec.adapter is None else base_folder
    new: tuple[str, ...] = ()  # modules that the base does not have
    if spec.method == "classification":
        model, new = load_classifier(folder, spec.labels(), spec.seed, dtype, device)
    elif spec.method == "embedding":
        model = load_embedder(folder, spec.seed, dtype, device)
    else:
        model = load_model(folder, dtype, device)
    if spec.adapter is not None:
        inject(model, spec.adapter, spec.seed, new)
        if start_folder is not None:
            load_adapter(model, start_folder)
    return model
