"""From logits to token ids: greedy or random, one batch at a time.

The order is vLLM's: penalties and bias, temperature, the `top_k` likeliest, those of at least `min_p` times the largest
probability, the nucleus (`top_p`) of what is left. Log-probabilities are of the logits before all of this.
A sequence's random numbers come from its own generator, seeded by (seed, index), one number per token, so they are the
same whatever else is in the batch.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

import torch

from service.engine.native.logprobs import Scores, log_probabilities, score
from service.engine.protocol import SamplingParams
from service.engine.token_text import Score

_NUM_DRAWN_AHEAD = 32


class SamplerState:
    """What one sequence keeps between its tokens."""

    def __init__(self, sampling: SamplingParams, index: int) -> None:
        self.temperature = sampling.temperature
        self.top_p = sampling.top_p
        self.top_k = sampling.top_k
        self.min_p = sampling.min_p
        self.num_top = sampling.logprobs  # likeliest tokens to tell; None: no log-probabilities
        self._bias = sampling.logit_bias
        self._bias_tensors: tuple[torch.Tensor, torch.Tensor] | None = None  # ids and values, where the logits are
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        self._counts: torch.Tensor | None = None  # of generated tokens, over the vocabulary
        self._draws: list[float] = []
        self._generator: torch.Generator | None = None
        if self.temperature > 0:
            seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
            digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
            self._generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

    @property
    def adjusts(self) -> bool:
        """Whether this sequence changes its logits before a token is chosen."""
        return self._penalises or bool(self._bias)

    @property
    def filters(self) -> bool:
        """Whether it draws from a part of the vocabulary only."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    def adjust(self, logits: torch.Tensor) -> None:
        """Change one row of logits [vocabulary] in place: the one hook for it. A mask of allowed tokens goes to its
        end, so that no bias brings back what it forbids."""
        if self._counts is not None:
            logits -= self._frequency * self._counts + self._presence * (self._counts > 0)
        if self._bias:
            if self._bias_tensors is None:
                ids, values = zip(*self._bias, strict=True)
                self._bias_tensors = (
                    torch.tensor(ids, dtype=torch.long, device=logits.device),
                    torch.tensor(values, dtype=logits.dtype, device=logits.device),
                )
            logits.index_add_(0, *self._bias_tensors)

    def note(self, token: torch.Tensor, logits: torch.Tensor) -> None:
        """Count a chosen token [1], for the penalties."""
        if not self._penalises:
            return
        if self._counts is None:
            self._counts = torch.zeros_like(logits)
        self._counts.index_add_(0, token, torch.ones_like(logits[:1]))

    @property
    def _penalises(self) -> bool:
        return self._presence != 0 or self._frequency != 0

    def draw(self) -> float:
        """The next uniform number in [0, 1)."""
        assert self._generator is not None
        if not self._draws:
            self._draws = torch.rand(_NUM_DRAWN_AHEAD, generator=self._generator, dtype=torch.float64).tolist()[::-1]
        return self._draws.pop()


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a step chose, on the device."""

    token_ids: torch.Tensor  # [rows]
    _scores: Scores | None = None  # of the rows that ask for log-probabilities
    _asking: tuple[tuple[int, int], ...] = ()  # those rows, each with how many of the likeliest tokens it wants

    def scores(self) -> list[Score | None]:
        """Log-probabilities by row, None for rows that do not ask; waits for the device where any does."""
        by_row: list[Score | None] = [None] * len(self.token_ids)
        if self._scores is not None:
            scores = self._scores.to_list([num_top for _, num_top in self._asking])
            for (row, _), of_row in zip(self._asking, scores, strict=True):
                by_row[row] = of_row
        return by_row


class BatchSampler:
    """The sampler of one set of rows; made anew when the batch changes, so that a step does no work per row."""

    def __init__(self, states: list[SamplerState], device: torch.device) -> None:
        self._adjusting = [(row, state) for row, state in enumerate(states) if state.adjusts]
        drawing = [(row, state) for row, state in enumerate(states) if state.temperature > 0]
        self._whole = _RandomRows([(row, s) for row, s in drawing if not s.filters], device)
        self._filtered = _RandomRows([(row, s) for row, s in drawing if s.filters], device)
        self._asking = tuple((row, s.num_top) for row, s in enumerate(states) if s.num_top is not None)
        self._asking_rows = torch.tensor([row for row, _ in self._asking], dtype=torch.long, device=device)

    def __call__(self, logits: torch.Tensor) -> Chosen:
        """Choose a token for every row of logits [rows, vocabulary]; the logits may be changed."""
        log_probs = log_probabilities(logits[self._asking_rows]) if self._asking else None
        for row, state in self._adjusting:
            state.adjust(logits[row])
        tokens = logits.argmax(-1)
        if self._whole.states:
            probabilities = self._whole.probabilities(logits)
            tokens[self._whole.rows] = _pick(probabilities, self._whole.draws())
        if self._filtered.states:
            probabilities, ids = self._filtered.likeliest(logits)
            picked = _pick(probabilities, self._filtered.draws())
            tokens[self._filtered.rows] = ids.gather(1, picked.unsqueeze(1)).squeeze(1)
        for row, state in self._adjusting:
            state.note(tokens[row : row + 1], logits[row])
        if log_probs is None:
            return Chosen(tokens)
        num_top = max(num for _, num in self._asking)
        return Chosen(tokens, score(log_probs, tokens[self._asking_rows], num_top), self._asking)


class _RandomRows:
    """The rows of a batch that draw at random in one way."""

    def __init__(self, rows: list[tuple[int, SamplerState]], device: torch.device) -> None:
        self._device = device
        self.states = [state for _, state in rows]
        self.rows = torch.tensor([row for row, _ in rows], dtype=torch.long, device=device)
        self._temperature = torch.tensor([[s.temperature] for s in self.states], device=device)
        self._top_p = torch.tensor([[s.top_p] for s in self.states], device=device)
        self._min_p = torch.tensor([[s.min_p] for s in self.states], device=device)
        self._top_k = torch.tensor([[s.top_k] for s in self.states], device=device)
        top_ks = [s.top_k for s in self.states]
        self._width = max(top_ks) if top_ks and all(top_ks) else 0  # tokens that any row keeps at most; 0: all

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Of these rows, [rows, vocabulary]."""
        return torch.softmax(logits[self.rows] / self._temperature, dim=-1)

    def likeliest(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the filters leave: weights, 0 for what they drop, and token ids, both [rows, width], likeliest first."""
        weights = self.probabilities(logits)
        if 0 < self._width < weights.shape[-1]:  # every row keeps a few only: no need to sort them all
            weights, ids = weights.topk(self._width, dim=-1)
        else:
            weights, ids = weights.sort(descending=True, stable=True)
        ranks = torch.arange(weights.shape[-1], device=self._device)
        weights[(ranks >= self._top_k) & (self._top_k > 0)] = 0.0
        weights[weights < self._min_p * weights[:, :1]] = 0.0
        before = weights.cumsum(-1) - weights
        weights[(before >= self._top_p * weights.sum(-1, keepdim=True)) & (self._top_p < 1)] = 0.0
        weights[:, 0].clamp_(min=torch.finfo(weights.dtype).tiny)  # top_p=0 leaves the likeliest
        return weights, ids

    def draws(self) -> torch.Tensor:
        """One uniform number per row, [rows, 1]."""
        return torch.tensor([[state.draw()] for state in self.states], dtype=torch.float64, device=self._device)


def _pick(weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The token at which the running sum of the weights passes each draw; never one of weight zero."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(sums, draws * sums[:, -1:], right=True).squeeze(1).clamp_(max=weights.shape[-1] - 1)
