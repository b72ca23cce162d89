"""Pre-training of the starter: a Llama of under a million parameters, a fixed number of steps, a fixed seed.

The number of steps, not a clock, ends it, so that the same machine writes the same bytes each time. Hidden matrices are
trained with Muon (Jordan 2024), which needs about half of AdamW's tokens here; embeddings and norms with AdamW.
fp32 throughout: many CPUs have no bf16 instructions, and there bf16 is a hundred times slower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from training.starter.corpus import Document
from training.starter.tokenizer import CONTEXT, END, PAD, encode

ROW_LENGTH = 256
ROWS_PER_STEP = 4
MATRIX_RATE = 8e-3
VECTOR_RATE = 8e-3
WARMUP_STEPS = 15
DECAY_SHARE = 0.5  # the last part of the steps, over which the rate falls to nearly zero
WEIGHT_DECAY = 0.05
OTHER_WEIGHT = 0.1  # loss weight of what users and system messages say, against 1 for speech
NUM_REPORTS = 40


@dataclass(frozen=True)
class Rows:
    """The corpus as steps × rows × tokens, with the loss weight of each token."""

    ids: torch.Tensor
    weights: torch.Tensor


def pack(tokenizer: Tokenizer, documents: Iterator[Document], num_steps: int) -> Rows:
    """Fill exactly `num_steps` batches from the stream of documents."""
    wanted = num_steps * ROWS_PER_STEP * ROW_LENGTH
    ids: list[int] = []
    weights: list[float] = []
    while len(ids) < wanted:
        more, speech = encode(tokenizer, next(documents))
        ids += more
        weights += [1.0 if said else OTHER_WEIGHT for said in speech]
    shape = (num_steps, ROWS_PER_STEP, ROW_LENGTH)
    return Rows(torch.tensor(ids[:wanted]).view(shape), torch.tensor(weights[:wanted]).view(shape))


def new_model(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """The untrained model; the caller has seeded torch."""
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, rows: Rows, progress: Callable[[str], None]) -> float:
    """One pass over the rows; returns the mean loss of the last tenth."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, MATRIX_RATE),
        torch.optim.AdamW(others, VECTOR_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, _rate(len(rows.ids))) for each in optimizers]
    num_steps = len(rows.ids)
    losses: list[float] = []
    for step in range(num_steps):
        loss = _loss(model, rows.ids[step], rows.weights[step])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % max(num_steps // NUM_REPORTS, 1) == 0:
            recent = losses[-10:]
            progress(f"pre-training step {step + 1}/{num_steps}, loss {sum(recent) / len(recent):.2f}")
    tail = losses[-max(num_steps // 10, 1) :]
    return sum(tail) / len(tail)


def _loss(model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="none"
    )
    weight = weights[:, 1:].reshape(-1)
    return (each * weight).sum() / weight.sum()


def _rate(num_steps: int) -> Callable[[int], float]:
    def at(step: int) -> float:
        left = (num_steps - step) / (num_steps * DECAY_SHARE)
        return min((step + 1) / WARMUP_STEPS, 1.0, max(left, 0.02))

    return at


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton–Schulz steps. torch's own does them in bf16, which few CPUs have."""

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every matrix."""
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                momentum = state.setdefault("momentum", torch.zeros_like(matrix))
                momentum.lerp_(matrix.grad, 0.05)
                update = _orthogonal(matrix.grad.lerp(momentum, 0.95))
                matrix.mul_(1 - group["lr"] * WEIGHT_DECAY)
                # 0.2 * sqrt(longer side) gives the update the size that AdamW's would have
                matrix.add_(update, alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * (square @ square)) @ x
    return x.T if tall else x


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """config.json, generation_config.json and model.safetensors."""
    model.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id
    )
    model.save_pretrained(folder)
