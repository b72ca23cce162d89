"""One step of the engine: read newest tokens and pieces of prompts, choose tokens, turn tokens into deltas.

Joins scheduler, runner, sampler and text; used from the engine's thread only. `num_…` may be read from any thread.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from service.engine.detokenizer import ChoiceText, TokenDecoder
from service.engine.native.runner import Feed, Runner
from service.engine.native.sampler import BatchSampler, SamplerState
from service.engine.native.scheduler import Scheduler
from service.engine.protocol import Delta

if TYPE_CHECKING:
    from service.engine.native.engine import Stream

PROMPT_TOKENS_PER_STEP = 512  # bounds how long running streams wait for the prompts of others


class Sequence:
    """One choice of a request while it is generated."""

    __slots__ = ("adapter", "num_prompt", "owner", "place", "sampler", "text", "token_ids")

    def __init__(self, stream: Stream, index: int, text: ChoiceText) -> None:
        self.owner, self.adapter, self.text = stream, stream.adapter, text
        self.sampler = SamplerState(stream.request.sampling, index)
        self.token_ids = list(stream.request.prompt_token_ids)  # and what was generated
        self.num_prompt = len(self.token_ids)
        self.place: Any = None

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return len(self.token_ids)

    @property
    def is_reading(self) -> bool:
        """Whether it has not yet read its prompt."""
        return bool(self.place.length < self.num_prompt)


class _Room:
    """The runner's places, for the scheduler."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def open(self, sequence: Sequence) -> bool:
        sequence.place = self._runner.open(sequence.token_ids, sequence.adapter)
        return sequence.place is not None

    def grow(self, sequence: Sequence) -> bool:
        return self._runner.grow(sequence.place, sequence.num_tokens)

    def close(self, sequence: Sequence) -> None:
        self._runner.close(sequence.place)
        sequence.place = None


class Stepper:
    """The state of all sequences, advanced one step at a time."""

    def __init__(
        self,
        runner: Runner,
        decoder: TokenDecoder,
        *,
        max_batch_size: int,
        stop_token_ids: frozenset[int],
        max_context: int | None,
        prompt_tokens_per_step: int = PROMPT_TOKENS_PER_STEP,
    ) -> None:
        self.runner = runner
        self.max_context = min(runner.max_context, max_context or runner.max_context)
        self.num_generated_tokens = 0
        self._decoder = decoder
        self._stop_token_ids = stop_token_ids
        self._scheduler: Scheduler[Sequence] = Scheduler(_Room(runner), max_batch_size, prompt_tokens_per_step)
        self._sampled: list[Sequence] = []  # whom the sampler is for
        self._sampler = BatchSampler([], runner.device)
        self._deltas: defaultdict[Stream, list[Delta]] = defaultdict(list)

    @property
    def num_running(self) -> int:
        """Sequences past the waiting line."""
        return len(self._scheduler.running)

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing."""
        return not self._scheduler.waiting and not self._scheduler.running

    def submit(self, stream: Stream) -> None:
        """Put a request's choices into the waiting line."""
        self._scheduler.submit(
            [
                Sequence(
                    stream,
                    index,
                    ChoiceText(
                        self._decoder,
                        stream.request,
                        index,
                        stop_token_ids=self._stop_token_ids,
                        max_context=self.max_context,
                    ),
                )
                for index in range(stream.request.n)
            ]
        )

    @torch.inference_mode()
    def cancel(self, stream: Stream) -> None:
        """Drop what is left of a request; its places are free at once."""
        self._scheduler.cancel(stream)

    @torch.inference_mode()
    def step(self) -> list[tuple[Stream, list[Delta]]]:
        """Advance everything; returns the new deltas by request."""
        feeds, ending, read = [], [], []
        for sequence, num in self._scheduler.plan():
            start = sequence.place.length
            ends = start + num == sequence.num_tokens
            feeds.append(Feed(sequence.place, sequence.token_ids[start : start + num], sequence.adapter, ends))
            if ends:
                ending.append(sequence)
                if num > 1:
                    read.append(sequence)
        if feeds:
            logits = self.runner.forward(feeds)
            for sequence in read:
                self.runner.keep(sequence.place, sequence.token_ids, sequence.adapter)
            if ending:
                self._choose(ending, logits)
        step, self._deltas = list(self._deltas.items()), defaultdict(list)
        return step

    def _choose(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        """The next token of each sequence."""
        if sequences != self._sampled:
            self._sampled = sequences
            self._sampler = BatchSampler([sequence.sampler for sequence in sequences], self.runner.device)
        for sequence, token in zip(sequences, self._sampler(logits).tolist(), strict=True):
            sequence.token_ids.append(token)
            self._take(sequence, token)

    def _take(self, sequence: Sequence, token: int) -> None:
        """A chosen token becomes text, and perhaps the sequence's end."""
        self.num_generated_tokens += 1
        delta = sequence.text.push(token)
        if delta is None:
            return
        self._deltas[sequence.owner].append(delta)
        if delta.finish_reason is not None:
            self._scheduler.finish(sequence)
