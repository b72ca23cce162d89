"""From logits to token ids: greedy or random, with penalties, one batch at a time.

A sequence's random numbers come from its own generator, seeded by (seed, index), one number per token, so they are the
same whatever else is in the batch.
"""

from __future__ import annotations

import hashlib
import secrets

import torch

from service.engine.protocol import SamplingParams

_NUM_DRAWN_AHEAD = 32


class SamplerState:
    """What one sequence keeps between its tokens."""

    def __init__(self, sampling: SamplingParams, index: int) -> None:
        self.temperature = sampling.temperature
        self.top_p = sampling.top_p
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
        return self._presence != 0 or self._frequency != 0

    def adjust(self, logits: torch.Tensor) -> None:
        """Change one row of logits in place: the one hook for it; a mask of allowed tokens would be applied here."""
        if self._counts is not None:
            logits -= self._frequency * self._counts + self._presence * (self._counts > 0)

    def note(self, token_id: int, logits: torch.Tensor) -> None:
        """Count a chosen token, for the penalties."""
        if self._counts is None:
            self._counts = torch.zeros_like(logits)
        self._counts[token_id] += 1

    def draw(self) -> float:
        """The next uniform number in [0, 1)."""
        assert self._generator is not None
        if not self._draws:
            self._draws = torch.rand(_NUM_DRAWN_AHEAD, generator=self._generator, dtype=torch.float64).tolist()[::-1]
        return self._draws.pop()


class BatchSampler:
    """The sampler of one set of rows; made anew when the batch changes, so that a step does no work per row."""

    def __init__(self, states: list[SamplerState], device: torch.device) -> None:
        self._adjusting = [(row, state) for row, state in enumerate(states) if state.adjusts]
        self._whole = _RandomRows(
            [(row, s) for row, s in enumerate(states) if s.temperature > 0 and s.top_p >= 1], device
        )
        self._nucleus = _RandomRows(
            [(row, s) for row, s in enumerate(states) if s.temperature > 0 and s.top_p < 1], device
        )

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Token ids [rows] for logits [rows, vocabulary]; the logits may be changed."""
        for row, state in self._adjusting:
            state.adjust(logits[row])
        tokens = logits.argmax(-1)
        if self._whole.states:
            probabilities = self._whole.probabilities(logits)
            tokens[self._whole.rows] = _pick(probabilities, self._whole.draws())
        if self._nucleus.states:
            probabilities, order = self._nucleus.probabilities(logits).sort(descending=True, stable=True)
            before = probabilities.cumsum(-1) - probabilities
            probabilities[before >= self._nucleus.top_p] = 0.0  # the first token always stays
            picked = _pick(probabilities, self._nucleus.draws())
            tokens[self._nucleus.rows] = order.gather(1, picked.unsqueeze(1)).squeeze(1)
        for row, state in self._adjusting:
            state.note(int(tokens[row]), logits[row])
        return tokens


class _RandomRows:
    """The rows of a batch that draw at random in one way."""

    def __init__(self, rows: list[tuple[int, SamplerState]], device: torch.device) -> None:
        self._device = device
        self.states = [state for _, state in rows]
        self.rows = torch.tensor([row for row, _ in rows], dtype=torch.long, device=device)
        self._temperature = torch.tensor([[s.temperature] for s in self.states], device=device)
        self.top_p = torch.tensor([[s.top_p] for s in self.states], device=device)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Of these rows, [rows, vocabulary]."""
        return torch.softmax(logits[self.rows] / self._temperature, dim=-1)

    def draws(self) -> torch.Tensor:
        """One uniform number per row, [rows, 1]."""
        return torch.tensor([[state.draw()] for state in self.states], dtype=torch.float64, device=self._device)


def _pick(weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The token at which the running sum of the weights passes each draw; never one of weight zero."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(sums, draws * sums[:, -1:], right=True).squeeze(1).clamp_(max=weights.shape[-1] - 1)
