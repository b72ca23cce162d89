"""Log-probabilities of chosen tokens and of prompts: log-softmax in fp32 of the logits as the model gave them.

Results stay on the device until somebody asks for them as Python values, so that scoring waits for nothing by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from service.engine.token_text import Score

_ROWS_AT_ONCE = 64  # prompt positions scored together: bounds the fp32 copy of a chunk's logits


@dataclass(frozen=True, slots=True)
class Scores:
    """Of one token per row: its log-probability [rows], and the likeliest tokens [rows, k] with theirs, best first."""

    logprobs: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor

    def to_list(self, num_top: Sequence[int]) -> list[Score]:
        """As Python values, each row with its own number of likeliest tokens; waits for the device."""
        ids, logprobs = self.top_ids.tolist(), self.top_logprobs.tolist()
        return [
            Score(logprob, tuple(zip(ids[row][:num], logprobs[row][:num], strict=True)))
            for row, (logprob, num) in enumerate(zip(self.logprobs.tolist(), num_top, strict=True))
        ]


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """fp32 [rows, vocabulary]; a copy, so the logits may be changed afterwards."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def score(log_probs: torch.Tensor, tokens: torch.Tensor, num_top: int) -> Scores:
    """The scores of tokens [rows] by log_probs [rows, vocabulary]."""
    top = log_probs.topk(min(num_top, log_probs.shape[-1]), dim=-1)
    return Scores(log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), top.indices, top.values)


class PromptScores:
    """The scores of a prompt's tokens but the first, gathered while the prompt is read.

    Give it the logits of every position, in order, in chunks of any length: position i scores token i + 1, and those of
    the last position are left to the sampler. So a prompt that is scored is read from its first token on.
    """

    def __init__(self, token_ids: Sequence[int], num_top: int) -> None:
        self._token_ids = token_ids
        self._num_top = num_top
        self._num_read = 0
        self._parts: list[Scores] = []

    def add(self, logits: torch.Tensor) -> None:
        """Logits [positions, vocabulary] of the next positions, of any floating type."""
        for rows in logits.split(_ROWS_AT_ONCE):
            start = self._num_read + 1
            next_ids = torch.tensor(self._token_ids[start : start + len(rows)], dtype=torch.long, device=logits.device)
            self._num_read += len(rows)
            self._parts.append(score(log_probabilities(rows[: len(next_ids)]), next_ids, self._num_top))

    def to_list(self) -> list[Score]:
        """One score per token but the first, once all is read; waits for the device."""
        assert self._num_read == len(self._token_ids), "a prompt is scored when all of it has been read"
        return [item for part in self._parts for item in part.to_list([self._num_top] * len(part.logprobs))]
