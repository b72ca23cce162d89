"""One step of the engine: read prompts a little, decode one token for every row, turn tokens into deltas.

Joins scheduler, runner, sampler and text; used from the engine's thread only. `num_…` may be read from any thread.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from service.engine.detokenizer import ChoiceText, echo_of
from service.engine.native.logprobs import PromptScores
from service.engine.native.runner import Prompt, Runner
from service.engine.native.sampler import BatchSampler, SamplerState
from service.engine.native.scheduler import Scheduler
from service.engine.protocol import Delta, GenerateRequest
from service.engine.token_text import Score, TokenDecoder, TokenPieces

if TYPE_CHECKING:
    from service.engine.native.engine import Stream

PREFILL_TOKENS_PER_STEP = 512  # prompt tokens read between two decode steps: bounds how long running streams wait


class Sequence:
    """One choice of a request while it is generated."""

    __slots__ = ("first_token", "group", "owner", "prompt", "sampler", "text")

    def __init__(self, stream: Stream, index: int, text: ChoiceText) -> None:
        self.owner = stream
        self.group = stream.adapter.id if stream.adapter else ""
        self.text = text
        self.sampler = SamplerState(stream.request.sampling, index)
        self.prompt: Prompt | None = None  # from when it has been read until the sequence has a row
        self.first_token = 0


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
        prefill_tokens_per_step: int = PREFILL_TOKENS_PER_STEP,
    ) -> None:
        self.runner = runner
        self.max_context = min(runner.max_context, max_context or runner.max_context)
        self.num_generated_tokens = 0
        self._pieces = TokenPieces(decoder)
        self._stop_token_ids = stop_token_ids
        self._prefill_tokens_per_step = prefill_tokens_per_step
        self._scheduler: Scheduler[Sequence] = Scheduler(max_batch_size)
        self._prompt: Prompt | None = None  # being read, for the scheduler's joining sequences
        self._sampler = BatchSampler([], runner.device)
        self._deltas: defaultdict[Stream, list[Delta]] = defaultdict(list)

    @property
    def num_running(self) -> int:
        """Sequences past the waiting line."""
        return self._scheduler.num_running

    @property
    def is_idle(self) -> bool:
        """Whether a step would do nothing."""
        return not self._scheduler.waiting and self._scheduler.num_running == 0

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

    def cancel(self, stream: Stream) -> None:
        """Drop what is left of a request; its rows are free at the next step."""
        self._scheduler.cancel(stream)

    @torch.inference_mode()
    def step(self) -> list[tuple[Stream, list[Delta]]]:
        """Advance everything; returns the new deltas by request."""
        self._read_prompts()
        if self._scheduler.has_changed:
            self._rearrange()
        if running := self._scheduler.running:
            chosen = self._sampler(self.runner.decode())
            tokens = self.runner.extend(chosen.token_ids)
            for sequence, token, score in zip(running, tokens, chosen.scores(), strict=True):
                self._take(sequence, token, score)
        step, self._deltas = list(self._deltas.items()), defaultdict(list)
        return step

    def _read_prompts(self) -> None:
        """Spend this step's prompt tokens; a prompt that is read gives its sequences their first tokens."""
        budget = self._prefill_tokens_per_step
        while budget > 0:
            if not self._scheduler.joining:  # also after a cancel of all whose prompt was being read
                joining = self._scheduler.admit()
                if not joining:
                    self._prompt = None
                    return
                owner = joining[0].owner
                ids = owner.request.prompt_token_ids
                self._prompt = Prompt(ids, owner.adapter, scores=_prompt_scores(owner.request))
            assert self._prompt is not None
            num_left = self._prompt.num_left
            logits = self.runner.read(self._prompt, budget)
            budget -= num_left - self._prompt.num_left
            if logits is not None:
                self._join(logits, self._prompt)

    def _join(self, logits: torch.Tensor, prompt: Prompt) -> None:
        """The prompt as output where asked for, and the first tokens of the sequences whose prompt has been read."""
        joining = list(self._scheduler.joining)
        self._scheduler.join()
        scores = prompt.scores.to_list() if prompt.scores is not None else None
        echo = echo_of(self._pieces, joining[0].owner.request, scores)
        for sequence in joining:
            self._send(sequence, sequence.text.begin(echo))
        if joining[0].text.finish_reason is not None:  # no token was asked for, of all alike
            return
        sampler = BatchSampler([sequence.sampler for sequence in joining], self.runner.device)
        chosen = sampler(logits.repeat(len(joining), 1))
        tokens: list[int] = chosen.token_ids.tolist()
        for sequence, token, score in zip(joining, tokens, chosen.scores(), strict=True):
            sequence.prompt, sequence.first_token = prompt, token
            self._take(sequence, token, score)

    def _rearrange(self) -> None:
        """Bring the runner's rows into the scheduler's new order."""
        layout = self._scheduler.arrange()
        running = self._scheduler.running
        seats = []
        for row, sequence in layout.seats:
            assert sequence.prompt is not None
            seats.append((row, sequence.prompt, sequence.first_token))
            sequence.prompt = None
        adapters = [(rows, running[rows.start].owner.adapter) for _, rows in layout.groups]
        groups = [(rows, adapter) for rows, adapter in adapters if adapter is not None]
        self.runner.rearrange(layout.moves, seats, groups, len(running))
        self._sampler = BatchSampler([sequence.sampler for sequence in running], self.runner.device)

    def _take(self, sequence: Sequence, token: int, score: Score | None) -> None:
        """A chosen token becomes text, and perhaps the sequence's end."""
        self.num_generated_tokens += 1
        self._send(sequence, sequence.text.push(token, score))

    def _send(self, sequence: Sequence, delta: Delta | None) -> None:
        """Output on its way, and the sequence's place free if it was the last."""
        if delta is None:
            return
        self._deltas[sequence.owner].append(delta)
        if delta.finish_reason is not None:
            self._scheduler.finish(sequence)


def _prompt_scores(request: GenerateRequest) -> PromptScores | None:
    """Where a prompt's own log-probabilities are asked for, what gathers them."""
    if not request.echo or request.sampling.logprobs is None:
        return None
    return PromptScores(request.prompt_token_ids, request.sampling.logprobs)
