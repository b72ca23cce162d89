"""What the stepper needs of a model: places for sequences, and forward passes over some tokens of each.

Three runners know how: `FlatRunner` for decoders whose attention goes through transformers' attention interface,
`LoopRunner` for others that keep keys and values, `SingleRunner` for the rest. Used from the engine's thread only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from service.engine.native.linear import Linear
from service.engine.native.logprobs import PromptScores
from service.engine.native.lora import LoadedAdapter

_DTYPES: dict[str, torch.dtype | str] = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16}
_DEFAULT_CONTEXT = 2048  # for configs that state none


class Place(Protocol):
    """Where a sequence's state is."""

    length: int  # tokens that were read


@dataclass(frozen=True, slots=True)
class Feed:
    """Tokens to read next in one sequence."""

    place: Any  # what the runner's `open` gave
    token_ids: Sequence[int]
    adapter: LoadedAdapter | None
    ends: bool  # whether the logits after the last one are wanted
    scores: PromptScores | None = None  # takes the logits after all of them, where a prompt is to be scored


class Runner(Protocol):
    """A model, and the state of the sequences that it reads."""

    device: torch.device
    vocab_size: int
    max_context: int
    layers: dict[str, Linear]  # that adapters may target
    reads_in_pieces: bool  # whether a prompt may be read piece by piece

    def open(self, token_ids: Sequence[int], adapter: LoadedAdapter | None, *, anew: bool) -> Place | None:
        """A place for a sequence that begins so; its `length` says how much of it is known already: nothing if it is to
        be read anew. None when there is no room."""
        ...

    def grow(self, place: Any, num_tokens: int) -> bool:
        """Make room for so many tokens in all; False when there is none."""
        ...

    def keep(self, place: Any, token_ids: Sequence[int], adapter: LoadedAdapter | None) -> None:
        """Remember what was read, for sequences that begin alike."""
        ...

    def close(self, place: Any) -> None:
        """Free a place."""
        ...

    def forward(self, feeds: Sequence[Feed]) -> torch.Tensor:
        """Read; logits fp32 [feeds that end, vocabulary], in the order of the feeds. A sequence that has been read to
        its end gets one token in every call from then on."""
        ...


def load_model(folder: Path, dtype: Literal["auto", "fp32", "bf16"]) -> PreTrainedModel:
    """A causal language model, on the GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=_DTYPES[dtype]
    )
    return model.to(device).eval()  # type: ignore[arg-type]


def context_of(model: PreTrainedModel) -> int:
    """Tokens, prompt and output together."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or _DEFAULT_CONTEXT


def load_runner(
    folder: Path,
    dtype: Literal["auto", "fp32", "bf16"],
    *,
    max_rows: int,
    with_adapters: bool,
    max_cache_tokens: int | None = None,
) -> Runner:
    """The fastest of the runners that can run the model."""
    from service.engine.native.flat_runner import FLAT_MODEL_TYPES, FlatRunner
    from service.engine.native.loop_runner import LoopRunner, keeps_keys_and_values
    from service.engine.native.single_runner import SingleRunner

    model = load_model(folder, dtype)
    if model.config.model_type in FLAT_MODEL_TYPES:
        return FlatRunner(model, max_rows=max_rows, with_adapters=with_adapters, max_cache_tokens=max_cache_tokens)
    if not keeps_keys_and_values(model):
        return SingleRunner(model)
    return LoopRunner(model, max_rows=max_rows, with_adapters=with_adapters)
