"""Preference tuning: of two answers to a conversation the better one is made more likely than the worse one.

Four losses over one score per answer. With log p the log-probability of an answer's tokens, and ref that of the start
weights, the score is log p - log ref (sigmoid, ipo) or log p per token (simpo, orpo, which need no reference). An
answer's reward is beta * score. All log-probabilities of a pair come from one micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch.nn.functional import logsigmoid

from training.batches import collate
from training.failure import check_flag
from training.fsdp import can_be_told
from training.lora import adapter_off
from training.methods.interface import LossSums
from training.model import kept_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from training.batches import Examples, MicroBatch
    from training.parallel import Workers
    from training.spec import DpoSpec, TrainSpec

MEANS: tuple[str, ...] = ("reward_chosen", "reward_rejected", "reward_margin")
_SURE = -1e-6  # log-probability per token above which the odds of an answer are not told apart in fp32


def prepare(
    spec: TrainSpec, model: PreTrainedModel, examples: Examples, workers: Workers, micro_batch_size: int
) -> Examples:
    """The start weights are gone after the first step, so their log-probabilities are kept with the examples. Only
    those of a fresh adapter stay: they are the base's, and `loss_sums` asks them."""
    if _starts_as_the_base(spec) or not _needs_reference(_settings(spec)):
        return examples
    table = torch.zeros(2 * len(examples) + 1, device=workers.device)  # the last one counts workers out of memory
    pairs = table[:-1].view(-1, 2)
    try:
        for indices in workers.passes(len(examples), micro_batch_size):
            found = _reference(model, collate(examples[indices or [0]]).to(workers.device)).view(-1, 2)
            if indices:
                pairs[indices] = found
    except (RuntimeError, MemoryError) as error:
        if not can_be_told(error, model):
            raise
        table[-1] += 1
    workers.sum_(table)
    check_flag(table[-1].item())
    return _WithReference(examples, pairs.tolist())


class _WithReference:
    """Examples with a column `reference`."""

    def __init__(self, examples: Examples, reference: list[list[float]]) -> None:
        self._examples, self._reference = examples, reference

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, indices: list[int]) -> dict[str, list[Any]]:
        return {**self._examples[indices], "reference": [self._reference[index] for index in indices]}


def loss_sums(spec: TrainSpec, model: PreTrainedModel, batch: MicroBatch) -> LossSums:
    """Counted are pairs; right is one whose better answer has the larger reward."""
    settings = _settings(spec)
    scores = _log_probs(model, batch)
    if not _needs_reference(settings):
        scores = scores / torch.tensor([batch.num_targets[place] for place in batch.places], device=scores.device)
    elif batch.reference is not None:
        scores = scores - batch.reference
    else:
        with adapter_off(model):
            scores = scores - _reference(model, batch)
    better, worse = scores.view(-1, 2).unbind(dim=1)
    loss = _LOSSES[settings.loss_type](settings, better, worse).sum()
    rewards = _beta(settings) * torch.stack([better, worse, better - worse]).detach().sum(dim=1)
    return LossSums(loss, (better > worse).sum(), len(better), rewards)


def _settings(spec: TrainSpec) -> DpoSpec:
    assert spec.dpo is not None
    return spec.dpo


def _starts_as_the_base(spec: TrainSpec) -> bool:
    return spec.adapter is not None and spec.start is None


def _needs_reference(settings: DpoSpec) -> bool:
    return settings.loss_type in ("sigmoid", "ipo")


def _log_probs(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """Log-probability of each sequence's trained tokens, in the order of the examples: better, worse, better, …"""
    logprobs, _ = kept_logprobs(model, batch)
    parts = logprobs.split(batch.num_targets)
    return torch.stack([parts[place].sum() for place in batch.places])


@torch.no_grad()
def _reference(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """The same as constants, and without dropout."""
    was_training = model.training
    model.eval()
    try:
        return _log_probs(model, batch)
    finally:
        model.train(was_training)


# -- losses per pair ---------------------------------------------------------------------------------------------------


def _sigmoid(settings: DpoSpec, better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    """Rafailov et al. 2023, "Direct Preference Optimization", equation 7."""
    return -logsigmoid(_beta(settings) * (better - worse))


def _ipo(settings: DpoSpec, better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    """Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences", equation 17;
    beta is their tau. As written there, an answer's log-probability is summed, not averaged, over its tokens."""
    return (better - worse - 1 / (2 * _beta(settings))) ** 2


def _simpo(settings: DpoSpec, better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    """Meng et al. 2024, "SimPO: Simple Preference Optimization with a Reference-Free Reward", equation 6."""
    return -logsigmoid(_beta(settings) * (better - worse) - cast(float, settings.gamma))


def _orpo(settings: DpoSpec, better: torch.Tensor, worse: torch.Tensor) -> torch.Tensor:
    """Hong et al. 2024, "ORPO: Monolithic Preference Optimization without Reference Model", equations 3 to 7: the
    likelihood of the better answer per token, and beta (their lambda) times the log odds ratio."""
    return -better - _beta(settings) * logsigmoid(_log_odds(better) - _log_odds(worse))


def _log_odds(score: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)) of p = exp(score)."""
    return score - torch.log(-torch.expm1(score.clamp(max=_SURE)))


def _beta(settings: DpoSpec) -> float:
    return cast(float, settings.beta)


_Loss = Callable[["DpoSpec", torch.Tensor, torch.Tensor], torch.Tensor]
_LOSSES: dict[Literal["sigmoid", "ipo", "simpo", "orpo"], _Loss] = {
    "sigmoid": _sigmoid,
    "ipo": _ipo,
    "simpo": _simpo,
    "orpo": _orpo,
}
