"""One evaluator for the models of both sides."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from training.attention import PACKED
from training.evaluation import evaluate
from training.examples import load_examples
from training.methods.supervised import loss_sums
from training.parallel import Workers
from training.spec import TrainSpec
from training.storage import Storage


def valid_loss(spec: TrainSpec, storage: Storage, model_folder: Path) -> float:
    """Mean over the trained tokens of the spec's training file, in fp32, of a model that anyone saved."""
    examples, _ = load_examples(spec, storage)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation=PACKED)
    return evaluate(model, partial(loss_sums, spec), examples, Workers(0, 1, torch.device("cpu")), 8).loss
