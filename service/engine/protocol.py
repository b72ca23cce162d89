"""What an engine is: the small protocol between a replica and inference. No Ray, no HTTP, no torch.

One engine serves one base model and any number of adapters on it. A request is a list of token ids with sampling
parameters; the answer is a stream of deltas. Text is detokenised in the engine, so that a stop string across token
borders or a UTF-8 character in two tokens is handled once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. `temperature=0` is greedy; `seed` fixes the random draws of this request's sequences.

    The logits of a step pass, in this order, through penalties and `logit_bias`, temperature, `top_k`, `min_p` (a share
    of the largest probability), and `top_p` of what is left.
    """

    max_tokens: int  # 0 only with the request's `echo`
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id, what is added to its logit
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    logprobs: int | None = None  # how many of the likeliest tokens to tell with each token; None: no log-probabilities


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """A LoRA adapter by immutable id, in a local folder of the PEFT layout."""

    id: str
    folder: Path


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One prompt, `n` independent continuations. Sequence i of a seeded request draws from its own stream (seed, i)."""

    id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    n: int = 1
    adapter: AdapterRef | None = None
    echo: bool = False  # every choice's text begins with the prompt's, and its log-probabilities with the prompt's


class TopLogprob(NamedTuple):
    """One of the likeliest tokens at a position."""

    token: str  # its text; a part of a character shows as U+FFFD, a special token as its name
    raw: bytes | None  # its UTF-8; None for a special token, which is no text
    logprob: float


class TokenLogprob(NamedTuple):
    """A token of a choice and how likely the model held it, by the softmax of its unmodified logits in fp32.

    `raw` of a choice's tokens, joined up, is the choice's text; only of a token that a stop string cuts in two it is
    the whole token. A stop token ends the entries without being text.
    """

    token: str
    raw: bytes | None
    logprob: float | None  # None for the first token of a prompt, which nothing predicts
    top: tuple[TopLogprob, ...]  # likeliest first
    offset: int  # where its text begins in the choice's text, in characters


@dataclass(frozen=True, slots=True)
class Delta:
    """New output of one choice. The last delta of a choice carries its finish reason."""

    index: int
    text: str
    num_tokens: int  # generated tokens this delta stands for; text may lag behind while a character is incomplete
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens whose text begins in what has been sent; where asked for
    num_cached_tokens: int = 0  # prompt tokens that were not read anew; in the first choice's first delta


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for metrics and for routing."""

    num_running: int
    num_waiting: int
    num_generated_tokens: int
    resident_adapters: tuple[str, ...] = ()
    num_adapter_loads: int = 0
    num_preempted: int = 0  # times that a sequence gave its place up and waited for another
    adapter_load_s: tuple[float, ...] = field(default=())  # recent loads, newest last


class QueueFull(Exception):
    """The engine's bounded waiting queue is full; try again later."""


class AdapterMismatch(Exception):
    """The adapter cannot run on this base; the message says why."""


class Engine(Protocol):
    """Inference for one base model."""

    max_context: int  # tokens, prompt and output together

    async def start(self) -> None:
        """Load the weights; returns when ready to generate."""
        ...

    async def load_adapter(self, adapter: AdapterRef) -> None:
        """Make an adapter resident, evicting the least recently used idle one; AdapterMismatch if it cannot run."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[list[Delta]]:
        """Stream deltas, those of one step together; closing the iterator frees the sequences within one step.

        Loads the adapter if it is not resident. QueueFull before the first delta when too much waits."""
        ...

    def stats(self) -> EngineStats:
        """Current counts; cheap."""
        ...

    async def stop(self) -> None:
        """End all sequences and free the weights."""
        ...
