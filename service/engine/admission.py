"""Which requests an engine takes: the checks and the bound that all engines share."""

from __future__ import annotations

from service.engine.protocol import GenerateRequest, QueueFull


class UnfitRequest(ValueError):
    """A request that this engine can never answer, whatever else it does; the message says why."""


class EngineFailed(RuntimeError):
    """The engine stopped or broke down; the cause says why. Every open stream gets it, so does a new request."""


def check_request(request: GenerateRequest, *, max_context: int, vocab_size: int | None) -> None:
    """UnfitRequest when this engine cannot answer the request; one bad request must not reach a batch."""
    prompt, sampling = request.prompt_token_ids, request.sampling
    if not prompt:
        raise UnfitRequest("the prompt has no tokens")
    if len(prompt) + min(1, sampling.max_tokens) > max_context:
        raise UnfitRequest(f"the prompt has {len(prompt)} tokens; this model's context is {max_context}")
    if vocab_size is not None and not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise UnfitRequest(f"the prompt has a token id outside the vocabulary of {vocab_size}")
    if request.n < 1:
        raise UnfitRequest("n must be at least 1")
    if sampling.max_tokens < (0 if request.echo else 1):
        raise UnfitRequest("max_tokens must be at least 1, or 0 with echo")
    if vocab_size is not None and not all(0 <= token_id < vocab_size for token_id, _ in sampling.logit_bias):
        raise UnfitRequest(f"logit_bias has a token id outside the vocabulary of {vocab_size}")


class Places:
    """Sequences an engine holds at most, running and waiting together. Used from one asyncio loop only."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.max_held = max_running + max_waiting
        self.num_held = 0

    def take(self, num_sequences: int) -> None:
        """QueueFull when they do not all fit; UnfitRequest when they never would."""
        if num_sequences > self.max_held:
            raise UnfitRequest(f"n={num_sequences} is more than the {self.max_held} sequences that this engine holds")
        if self.num_held + num_sequences > self.max_held:
            raise QueueFull(f"the engine already holds {self.num_held} sequences of at most {self.max_held}")
        self.num_held += num_sequences

    def give_back(self, num_sequences: int) -> None:
        """The sequences have ended."""
        self.num_held -= num_sequences
        assert self.num_held >= 0
