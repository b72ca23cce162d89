"""What gateway and replica say to each other: small frozen values that survive pickling.

Errors travel as values (`Refused`), not as exceptions: Ray wraps what a replica raises, and a client's mistake is no
fault of the replica. Owns no behaviour.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from service.engine.protocol import Delta
from service.errors import ServiceError
from training.records import ChatMessage

if TYPE_CHECKING:
    import numpy as np

Task = Literal["generate", "classify", "embed"]


@dataclass(frozen=True, slots=True)
class Folder:
    """A committed folder in storage: its key, and the hash of the manifest that was recorded for it."""

    key: str
    manifest_hash: str


@dataclass(frozen=True, slots=True)
class Deployable:
    """What one Serve app hosts: a base with all adapters on it, or one fine-tuned model by itself."""

    kind: Literal["base", "full"]
    id: str  # of the base, or of the fine-tuned model
    base_id: str
    folder: Folder
    task: Task = "generate"
    base_folder: Folder | None = None  # the weights, where `folder` is an adapter that is merged into them

    @property
    def key(self) -> str:
        """The part of the app's name that says what it hosts; ids hold characters that names may not."""
        digest = hashlib.sha256(f"{self.kind}\0{self.id}\0{self.folder.manifest_hash}".encode()).hexdigest()
        return f"{self.kind}-{digest[:16]}"


@dataclass(frozen=True, slots=True)
class Target:
    """What a name in a request means at this moment: an immutable model and the app that serves it."""

    model_id: str
    base_id: str
    kind: Literal["base", "adapter", "full"]
    deployable: Deployable
    adapter: Folder | None  # set for an adapter that lives in its base's app
    capabilities: tuple[str, ...]
    max_context: int
    alias: str | None = None
    alias_revision: int | None = None


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation to answer, in the very type that training renders."""

    messages: tuple[ChatMessage, ...]


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """Text to continue."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """Token ids to continue."""

    token_ids: tuple[int, ...]


Prompt = ChatPrompt | TextPrompt | TokenPrompt


@dataclass(frozen=True, slots=True)
class ServeRequest:
    """One prompt to continue. `max_tokens` is refused if it does not fit, `default_max_tokens` is cut to what fits."""

    request_id: str
    target: Target
    prompt: Prompt
    max_tokens: int | None = None
    max_tokens_param: str = "max_tokens"  # the request field that errors name
    default_max_tokens: int | None = None  # None: all that the context leaves
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id, what is added to its logit
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    logprobs: int | None = None  # likeliest tokens to tell with each token; None: no log-probabilities
    echo: bool = False
    is_streamed: bool = True  # whether the client sees the output as it comes


@dataclass(frozen=True, slots=True)
class EncodeRequest:
    """Texts, or token ids taken as they are, to classify or to embed."""

    request_id: str
    target: Target
    inputs: tuple[str | tuple[int, ...], ...]
    is_list: bool  # whether errors name `input[i]`, or `input`


@dataclass(frozen=True, slots=True)
class Received:
    """A replica has the request. What follows may take as long as its queue is; until then a replica is awaited."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The engine took the request; `deltas` are its first ones, so that they cost no hop of their own."""

    num_prompt_tokens: int
    deltas: list[Delta]
    num_cached_tokens: int = 0  # prompt tokens that the engine did not have to read anew


@dataclass(frozen=True, slots=True)
class Refused:
    """The request ends here with this error; before or after the first delta."""

    error: ServiceError


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """The answer to an EncodeRequest: a row for each input, of log-probabilities of the labels or an embedding."""

    num_tokens: int  # read, over all inputs
    labels: tuple[str, ...]  # empty for embeddings
    rows: np.ndarray  # float32 [inputs, labels or width]


Reply = Received | Accepted | list[Delta] | Encoded | Refused
