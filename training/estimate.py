"""What a run will need: memory of its largest micro-batch, disk, and time. Arithmetic on counts; no torch.

The constants of the memory model stand together below. `python -m tests.bench plan` trains a set of cases, compares
what they took with what is said here, and prints the ratio of each: fit the constants again when it drifts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from training.model_shape import ModelShape
from training.spec import TrainSpec

if TYPE_CHECKING:
    from training.plan import Plan

Counts = npt.NDArray[np.int64]  # one number per example

# -- constants of the memory model, fitted on a CPU with torch 2.13 and transformers 5.23 ------------------------------

PROCESS_BYTES = 544_000_000  # Python with torch, transformers and datasets imported, before any model
ADAM_BYTES = 12  # per trained number: gradient, and Adam's two moments, all in fp32
# Numbers that a layer keeps per token for its backward pass, in multiples of the width (h) and of the MLP's width (i),
# beside keys and values: inputs of the attention's and the MLP's matrices (3h), queries and attention's output (2h),
# gate, its activation, up and their product (4i), or up and its activation where there is no gate (2i); a trained norm
# keeps its normalised input as well (2h).
KEPT_WIDTHS, KEPT_NORM_WIDTHS = 5, 2
KEPT_MLP_WIDTHS = {True: 4, False: 2}  # by whether the MLP has a gate
FP32_WIDTHS = 2  # inputs of the two norms, in fp32 whatever the precision
HELD_LOGITS = 1.81  # bytes held for each byte of the logits of trained tokens, over which their gradients are written
HELD = {True: 1.40, False: 1.24}  # bytes held for each byte of activations; by whether an adapter is trained: its
# layers make one output more than they keep
HELD_UNDER_HEADS = 1.35  # the same of classification and embedding, whose heads have no logits over a vocabulary
KERNEL_BYTES = 79_000_000  # matrix products that oneDNN compiled and keeps, in bf16 on a CPU

MAX_EPOCHS_SEEN = 4  # the largest micro-batch hardly grows with more of them

# -- constants of the time model ---------------------------------------------------------------------------------------

START_S = 4.0  # a worker's imports
LOAD_BYTES_PER_S = 1e9
CHECKPOINT_BYTES_PER_S = 2e8  # written, hashed, and copied to storage
FORWARD_SHARE = {True: 1 / 2, False: 1 / 3}  # of a step's time; by whether an adapter is trained


@dataclass(frozen=True, slots=True)
class Parts:
    """What one worker holds, in bytes."""

    weights: int  # in the run's precision
    state: int  # weights, their fp32 masters, gradients and Adam's moments
    activations: int  # kept by the largest micro-batch for its backward pass
    logits: int  # of its trained tokens
    kernels: int  # compiled matrix products


def peak_memory(spec: TrainSpec, shape: ModelShape, tokens: Counts, trained: Counts, *, on_gpu: bool = False) -> int:
    """Peak bytes of one worker's process, or of what it holds on a GPU: of a resolved spec whose examples have so many
    tokens, and so many of them with a loss.

    Loading takes the stored weights beside those in the run's precision, which for an adapter on a small batch is the
    peak. On a GPU there is no process and no oneDNN; that case was not fitted.
    """
    held = parts(spec, shape, tokens, trained)
    batch = _held(spec) * held.activations + HELD_LOGITS * held.logits
    if on_gpu:
        return held.state + round(batch)
    training = held.state + round(batch) + held.kernels
    return PROCESS_BYTES + max(training, held.weights + shape.weights_bytes)


def parts(spec: TrainSpec, shape: ModelShape, tokens: Counts, trained: Counts) -> Parts:
    """What `peak_memory` is made of; the benchmark fits the constants to it."""
    weights = _compute_bytes(spec) * shape.num_parameters
    num_trained = trained_parameters(spec, shape)
    masters = 0 if spec.adapter is None and spec.precision == "fp32" else 4 * num_trained
    state = weights + masters + ADAM_BYTES * num_trained
    if spec.parallel == "fsdp":
        state = _sharded_state(spec, shape)
    if _has_head(spec):
        trained = np.zeros_like(trained)
    batch_tokens, batch_trained = _largest_micro_batch(spec, shape, tokens, trained)
    return Parts(
        weights=weights,
        state=state,
        activations=batch_tokens * _activation_bytes(spec, shape),
        logits=batch_trained * shape.vocab_size * _compute_bytes(spec),
        kernels=KERNEL_BYTES if spec.precision == "bf16" else 0,
    )


def _sharded_state(spec: TrainSpec, shape: ModelShape) -> int:
    """A worker's share of weights, masters, gradients and moments, among the fewest that may share them, and what is
    gathered at a time: everything outside of the layers, and two layers, with the gradients of what is trained; an
    adapter is whole everywhere."""
    width, num_trained = _compute_bytes(spec), trained_parameters(spec, shape)
    in_layers = shape.num_layer_parameters
    gathered = shape.num_parameters - in_layers + 2 * in_layers // shape.num_layers
    if spec.adapter is None:
        return (4 + ADAM_BYTES) * num_trained // spec.least_workers() + 2 * width * gathered
    return width * (shape.num_parameters // spec.least_workers() + gathered) + (4 + ADAM_BYTES) * num_trained


def trained_parameters(spec: TrainSpec, shape: ModelShape) -> int:
    """Numbers that the optimizer changes."""
    if spec.adapter is None:
        return shape.num_parameters
    adapted = shape.adapted(spec.adapter.targets).values()
    magnitudes = sum(max(dims) for dims in adapted) if spec.adapter.dora else 0
    return cast(int, spec.adapter.rank) * sum(sum(dims) for dims in adapted) + magnitudes


def checkpoint_bytes(spec: TrainSpec, shape: ModelShape) -> int:
    """One checkpoint: what an artifact holds, and the trained weights and Adam's two moments in fp32."""
    return artifact_bytes(spec, shape) + 12 * trained_parameters(spec, shape)


def artifact_bytes(spec: TrainSpec, shape: ModelShape) -> int:
    """Weights of a servable folder: an adapter's in fp32, or all of them as the base stores its own."""
    return shape.weights_bytes if spec.adapter is None else 4 * trained_parameters(spec, shape)


def num_checkpoints(plan: Plan) -> int:
    """How many a run writes at its intervals; with a validation set every better evaluation adds one."""
    return ceil(plan.total_steps / cast(int, plan.spec.checkpoint_interval))


def num_kept_checkpoints(plan: Plan) -> int:
    """How many there are at the most after the run: the last k, and with validation the best that each knows of."""
    num_last = min(plan.spec.keep_checkpoints, num_checkpoints(plan))
    return 2 * num_last if plan.num_validation_examples else num_last


def disk_bytes(plan: Plan) -> int:
    """What a run leaves in storage: the checkpoints that are kept, and the artifact."""
    return num_kept_checkpoints(plan) * plan.checkpoint_bytes + plan.artifact_bytes


def duration_s(plan: Plan, shape: ModelShape, tokens_per_s: float, render_s: float) -> float:
    """Seconds from a worker's start to the artifact. `tokens_per_s` are what one worker trains, with or without a loss;
    `render_s` is what rendering the files took while planning.

    Workers are taken to share the work evenly, and to lose nothing to each other.
    """
    spec, is_lora = plan.spec, plan.spec.adapter is not None
    num_read = cast(int, spec.hyperparameters.n_epochs) * plan.num_tokens
    if spec.validates():
        num_evaluations = ceil(plan.total_steps / cast(int, spec.eval_interval))
        num_read += round(FORWARD_SHARE[is_lora] * num_evaluations * plan.num_validation_tokens)
    steps_s = num_read / spec.num_workers / tokens_per_s
    writing_s = (num_checkpoints(plan) * plan.checkpoint_bytes + plan.artifact_bytes) / CHECKPOINT_BYTES_PER_S
    return START_S + render_s + shape.weights_bytes / LOAD_BYTES_PER_S + steps_s + writing_s


def _has_head(spec: TrainSpec) -> bool:
    """Whether a small head takes the place of the logits over the vocabulary."""
    return spec.method in ("classification", "embedding")


def _held(spec: TrainSpec) -> float:
    return HELD_UNDER_HEADS if _has_head(spec) else HELD[spec.adapter is not None]


def _compute_bytes(spec: TrainSpec) -> int:
    return 4 if spec.precision == "fp32" else 2


def _activation_bytes(spec: TrainSpec, shape: ModelShape) -> int:
    """Kept per token for the backward pass, all layers together."""
    hidden, width = shape.hidden_size, _compute_bytes(spec)
    kept = KEPT_WIDTHS * hidden + 2 * shape.kv_size + KEPT_MLP_WIDTHS[shape.has_gates] * shape.mlp_size
    if spec.adapter is None:
        kept += KEPT_NORM_WIDTHS * hidden
    return shape.num_layers * (kept * width + 4 * FP32_WIDTHS * hidden) + _adapter_outputs(spec, shape) * width


def _adapter_outputs(spec: TrainSpec, shape: ModelShape) -> int:
    """Numbers per token that an adapter keeps: its products with A, and with DoRA each adapted layer's output again."""
    if spec.adapter is None:
        return 0
    adapted = shape.adapted(spec.adapter.targets).values()
    outputs = sum(max(dims) for dims in adapted) if spec.adapter.dora else 0
    return len(adapted) * cast(int, spec.adapter.rank) + outputs


def _largest_micro_batch(spec: TrainSpec, shape: ModelShape, tokens: Counts, trained: Counts) -> tuple[int, int]:
    """Tokens, and those with a loss, of the micro-batch that holds most, in the order that a run of this seed takes."""
    per_token = _held(spec) * _activation_bytes(spec, shape)
    cost = per_token * tokens + HELD_LOGITS * shape.vocab_size * _compute_bytes(spec) * trained
    hyper = spec.hyperparameters
    batch_size = cast(int, hyper.batch_size)
    num_steps = ceil(len(tokens) / batch_size)
    order = np.full(num_steps * batch_size, len(tokens))
    cost, tokens, trained = (np.append(column, 0) for column in (cost, tokens, trained))  # where a batch is short
    best = (0.0, 0, 0)
    for epoch in range(min(cast(int, hyper.n_epochs), MAX_EPOCHS_SEEN)):
        order[: len(tokens) - 1] = np.random.default_rng([spec.seed, epoch]).permutation(len(tokens) - 1)
        steps = order.reshape(num_steps, batch_size)
        for rank in range(spec.num_workers):
            share = steps[:, rank :: spec.num_workers]
            for part in np.array_split(share, cast(int, hyper.gradient_accumulation_steps), axis=1):
                row = part[cost[part].sum(axis=1).argmax()]
                best = max(best, (float(cost[row].sum()), int(tokens[row].sum()), int(trained[row].sum())))
    return best[1:]
