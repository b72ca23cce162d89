"""One step of the engine: read newest tokens and pieces of prompts, choose tokens, turn tokens into deltas.

Joins scheduler, runner, sampler and text; used from the engine's thread only. `num_…` may be read from any thread.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from service.engine.detokenizer import ChoiceText, echo_of
from service.engine.native.logprobs import PromptScores
from service.engine.native.runner import Feed, Runner
from service.engine.native.sampler import BatchSampler, SamplerState
from service.engine.native.scheduler import Scheduler
from service.engine.protocol import Delta
from service.engine.token_text import TokenDecoder, TokenPieces

if TYPE_CHECKING:
    from service.engine.native.engine import Stream

# As few as keep the processor busy: they bound how long running streams wait for the prompts of others, and of many
# prompts that come together the first need not wait for the last.
_PROMPT_TOKENS_PER_STEP = {"cpu": 128, "cuda": 1024}


class Sequence:
    """One choice of a request while it is generated."""

    __slots__ = ("adapter", "has_begun", "num_cached", "num_prompt", "owner", "place", "sampler", "text", "token_ids")

    def __init__(self, stream: Stream, index: int, text: ChoiceText) -> None:
        self.owner, self.adapter, self.text = stream, stream.adapter, text
        self.sampler = SamplerState(stream.request.sampling, index)
        self.token_ids = list(stream.request.prompt_token_ids)  # and what was generated
        self.num_prompt = len(self.token_ids)
        self.num_cached = 0  # tokens of the prompt that were not read anew
        self.place: Any = None
        self.has_begun = False  # whether its prompt has been read, perhaps in a place that it gave up

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return len(self.token_ids)

    @property
    def is_reading(self) -> bool:
        """Whether it has not yet read its prompt."""
        return bool(self.place.length < self.num_prompt)

    @property
    def scores(self) -> PromptScores | None:
        """What takes the scores of the prompt while this sequence reads it."""
        return None if self.has_begun or self.text.index else self.owner.scores


class _Room:
    """The runner's places, for the scheduler."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def open(self, sequence: Sequence) -> bool:
        num_top = _num_top_to_score(sequence)
        sequence.place = self._runner.open(sequence.token_ids, sequence.adapter, anew=num_top is not None)
        if sequence.place is None:
            return False
        if num_top is not None:
            sequence.owner.scores = PromptScores(sequence.owner.request.prompt_token_ids, num_top)
        if not sequence.has_begun:
            sequence.num_cached = sequence.place.length
        return True

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
        prompt_tokens_per_step: int | None = None,
    ) -> None:
        self.runner = runner
        self.max_context = min(runner.max_context, max_context or runner.max_context)
        self.num_generated_tokens = 0
        self._pieces = TokenPieces(decoder)
        self._stop_token_ids = stop_token_ids
        max_prompt_tokens = prompt_tokens_per_step or _PROMPT_TOKENS_PER_STEP[runner.device.type]
        if not runner.reads_in_pieces:
            max_prompt_tokens = max_batch_size * self.max_context
        self._scheduler: Scheduler[Sequence] = Scheduler(_Room(runner), max_batch_size, max_prompt_tokens)
        self._sampled: list[Sequence] = []  # whom the sampler is for
        self._sampler = BatchSampler([], runner.device)
        self._deltas: defaultdict[Stream, list[Delta]] = defaultdict(list)

    @property
    def num_running(self) -> int:
        """Sequences past the waiting line."""
        return len(self._scheduler.running)

    @property
    def num_preempted(self) -> int:
        """Times that a sequence gave its place up."""
        return self._scheduler.num_preempted

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
                        self._pieces,
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
        plan = self._scheduler.plan()
        feeds = [_feed(sequence, num_tokens) for sequence, num_tokens in plan]
        if feeds:
            logits = self.runner.forward(feeds)
            ending = [sequence for (sequence, _), feed in zip(plan, feeds, strict=True) if feed.ends]
            for sequence, num_tokens in plan:
                if num_tokens > 1 and sequence.place.length == sequence.num_tokens:
                    self.runner.keep(sequence.place, sequence.token_ids, sequence.adapter)
            self._choose(ending, logits)
        step, self._deltas = list(self._deltas.items()), defaultdict(list)
        return step

    def _choose(self, sequences: list[Sequence], logits: torch.Tensor) -> None:
        """The next token of each sequence, by logits [sequences, vocabulary]."""
        for sequence in sequences:
            if not sequence.has_begun:
                self._begin(sequence)
        rows = [row for row, sequence in enumerate(sequences) if sequence.text.finish_reason is None]
        if len(rows) < len(sequences):  # some wanted no token
            sequences, logits = [sequences[row] for row in rows], logits[rows]
        if sequences != self._sampled:
            self._sampled = sequences
            self._sampler = BatchSampler([sequence.sampler for sequence in sequences], self.runner.device)
        if not sequences:
            return
        chosen = self._sampler(logits)
        for sequence, token, score in zip(sequences, chosen.token_ids.tolist(), chosen.scores(), strict=True):
            sequence.token_ids.append(token)
            self.num_generated_tokens += 1
            self._send(sequence, sequence.text.push(token, score))

    def _begin(self, sequence: Sequence) -> None:
        """The prompt has been read: it is output where that was asked for."""
        stream = sequence.owner
        if stream.request.echo and stream.echo is None:
            stream.echo = echo_of(self._pieces, stream.request, stream.scores.to_list() if stream.scores else None)
        sequence.has_begun = True
        self._send(sequence, sequence.text.begin(stream.echo))

    def _send(self, sequence: Sequence, delta: Delta | None) -> None:
        """Output on its way, and the sequence's place free if it was the last."""
        if delta is None:
            return
        if sequence.num_cached and not sequence.text.index:
            delta, sequence.num_cached = replace(delta, num_cached_tokens=sequence.num_cached), 0
        self._deltas[sequence.owner].append(delta)
        if delta.finish_reason is not None:
            self._scheduler.finish(sequence)


def _num_top_to_score(sequence: Sequence) -> int | None:
    """How many of the likeliest tokens to tell with each of the prompt, which this sequence is to read for that; None
    if it is not. The first choice does so for all."""
    request = sequence.owner.request
    return request.sampling.logprobs if request.echo and not sequence.text.index and not sequence.has_begun else None


def _feed(sequence: Sequence, num_tokens: int) -> Feed:
    """The next tokens of a sequence."""
    start = sequence.place.length
    stop = start + num_tokens
    return Feed(
        sequence.place,
        sequence.token_ids[start:stop],
        sequence.adapter,
        ends=stop == sequence.num_tokens,
        scores=sequence.scores,
    )
