"""The forward passes: loading a model, reading prompts in chunks, one decode step for all rows.

Owns the model, the batch's cache and its newest tokens. Knows rows, not requests. Used from the engine's thread only.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from service.engine.native import attention
from service.engine.native.adapters import ActiveAdapters, LoadedAdapter, LoraLinear, attach
from service.engine.native.kv_cache import RowCache
from service.engine.native.logprobs import PromptScores

_DTYPES: dict[str, torch.dtype | str] = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16}
_DEFAULT_CONTEXT = 2048  # for configs that state none


@dataclass
class Prompt:
    """A prompt while it is read, on its own, in chunks."""

    token_ids: tuple[int, ...]
    adapter: LoadedAdapter | None
    cache: DynamicCache = field(default_factory=DynamicCache)
    num_read: int = 0
    scores: PromptScores | None = None  # takes the logits of all its positions, where its tokens are to be scored

    @property
    def num_left(self) -> int:
        """Tokens that are still to be read."""
        return len(self.token_ids) - self.num_read


class Runner:
    """A model and the rows that it continues."""

    def __init__(
        self, folder: Path, *, dtype: Literal["auto", "fp32", "bf16"], max_rows: int, with_adapters: bool
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=_DTYPES[dtype]
        )
        self._model = model.to(self.device).eval()  # type: ignore[arg-type]
        attention.install(model)
        self.active = ActiveAdapters()
        self.lora_layers: dict[str, LoraLinear] = attach(model, self.active) if with_adapters else {}
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        text_config = model.config.get_text_config()
        self.max_context: int = getattr(text_config, "max_position_embeddings", None) or _DEFAULT_CONTEXT
        parameters = inspect.signature(model.forward).parameters
        self._has_positions = "position_ids" in parameters
        self._last_logits = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._rows = RowCache(max_rows, self.device)
        self._num_rows = 0
        self._tokens = torch.zeros(max_rows, dtype=torch.long, device=self.device)  # newest of each row, not yet read
        self._groups: list[tuple[slice, LoadedAdapter]] = []
        self._check_cache()

    def _check_cache(self) -> None:
        """ValueError for models whose state is more than keys and values per token (recurrent, shared layers)."""
        kinds = {type(layer).__name__ for layer in DynamicCache(config=self._model.config).layers}
        prompt = Prompt((0,), None)
        self.read(prompt, 1)
        plain = all(isinstance(layer, DynamicLayer) and layer.is_initialized for layer in prompt.cache.layers)
        if not plain or not kinds <= {"DynamicLayer", "DynamicSlidingWindowLayer"}:
            raise ValueError(
                f"{self._model.config.model_type} models keep a state that this engine cannot batch: {kinds}"
            )

    def read(self, prompt: Prompt, max_tokens: int) -> torch.Tensor | None:
        """Read the next chunk of a prompt; the logits [1, vocabulary] of its last token once all is read."""
        chunk = prompt.token_ids[prompt.num_read : prompt.num_read + max_tokens]
        stop = prompt.num_read + len(chunk)
        self.active.groups = [(slice(0, 1), prompt.adapter)] if prompt.adapter else []
        positions = torch.arange(prompt.num_read, stop, device=self.device).unsqueeze(0)
        mask = torch.ones(1, stop, dtype=torch.bool, device=self.device)
        token_ids = torch.tensor([chunk], device=self.device)
        if prompt.scores is None:
            logits = self._forward(token_ids, positions, mask, prompt.cache)
        else:
            of_all = self._all_logits(token_ids, positions, mask, prompt.cache, {})
            prompt.scores.add(of_all[0])
            logits = of_all[:, -1].float()
        prompt.num_read = stop
        return None if prompt.num_left else logits

    def rearrange(
        self,
        moves: list[tuple[int, int]],
        seats: Sequence[tuple[int, Prompt, int]],
        groups: list[tuple[slice, LoadedAdapter]],
        num_rows: int,
    ) -> None:
        """Change the batch: rows (from, to), then new rows (row, read prompt, first token); adapters by rows."""
        for_cache = [(row, prompt.cache, len(prompt.token_ids)) for row, prompt, _ in seats]
        if moves:
            old, new = (torch.tensor(rows, device=self.device) for rows in zip(*moves, strict=True))
            self._tokens[new] = self._tokens[old]
        if seats:
            rows = torch.tensor([row for row, _, _ in seats], device=self.device)
            self._tokens[rows] = torch.tensor([token for _, _, token in seats], device=self.device)
        self._rows.rearrange(moves, for_cache, num_rows)
        self._groups, self._num_rows = groups, num_rows

    def decode(self) -> torch.Tensor:
        """Read the newest token of every row; the logits [rows, vocabulary] for the next."""
        self.active.groups = self._groups
        positions, mask = self._rows.advance()
        return self._forward(self._tokens[: self._num_rows].unsqueeze(1), positions, mask, self._rows)

    def extend(self, tokens: torch.Tensor) -> list[int]:
        """Append a chosen token to every row; returns them."""
        self._tokens[: self._num_rows] = tokens
        chosen: list[int] = tokens.tolist()
        return chosen

    def _forward(
        self, token_ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, cache: DynamicCache | RowCache
    ) -> torch.Tensor:
        """The logits [rows, vocabulary] of each row's last position."""
        logits = self._all_logits(token_ids, positions, mask, cache, self._last_logits)
        return logits[:, -1].float()

    def _all_logits(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        cache: DynamicCache | RowCache,
        which: dict[str, int],
    ) -> torch.Tensor:
        """Logits [rows, positions, vocabulary]; `which` may name fewer positions to models that can be told."""
        where = {"position_ids": positions} if self._has_positions else {}
        output = self._model(
            input_ids=token_ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **where,
            **which,
        )
        logits: torch.Tensor = output.logits
        return logits
