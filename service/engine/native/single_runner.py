"""The slowest path, for models whose state is more than keys and values of each token (state-space models, hybrids,
shared layers): every sequence keeps transformers' own cache and is continued by itself. Runs no adapters, because the
code of such models reads weights past their layers."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from service.engine.native.linear import Linear
from service.engine.native.lora import LoadedAdapter
from service.engine.native.runner import Feed, context_of


@dataclass(eq=False)
class SinglePlace:
    """A sequence and its state."""

    cache: DynamicCache
    length: int = 0


class SingleRunner:
    """A model that reads one sequence at a time."""

    reads_in_pieces = False  # such models continue by one token only

    def __init__(self, model: PreTrainedModel) -> None:
        self.device = model.device
        self.layers: dict[str, Linear] = {}
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        self.max_context = context_of(model)
        self._model = model
        self._parameters = inspect.signature(model.forward).parameters
        self._cache_name = "cache_params" if "cache_params" in self._parameters else "past_key_values"

    def open(self, token_ids: Sequence[int], adapter: LoadedAdapter | None, *, anew: bool) -> SinglePlace:
        """See Runner."""
        return SinglePlace(DynamicCache(config=self._model.config))

    def grow(self, place: SinglePlace, num_tokens: int) -> bool:
        """See Runner."""
        return True

    def keep(self, place: SinglePlace, token_ids: Sequence[int], adapter: LoadedAdapter | None) -> None:
        """Nothing is remembered."""

    def close(self, place: SinglePlace) -> None:
        """The state goes with its place."""

    def forward(self, feeds: Sequence[Feed]) -> torch.Tensor:
        """See Runner."""
        wanted = [logits for feed in feeds if (logits := self._read(feed)) is not None]
        return torch.stack(wanted) if wanted else torch.empty(0, self.vocab_size, device=self.device)

    def _read(self, feed: Feed) -> torch.Tensor | None:
        """One sequence; the logits [vocabulary] after its end."""
        place: SinglePlace = feed.place
        stop = place.length + len(feed.token_ids)
        options: dict[str, Any] = {self._cache_name: place.cache, "use_cache": True}
        if "position_ids" in self._parameters:
            options["position_ids"] = torch.arange(place.length, stop, device=self.device).unsqueeze(0)
        if "logits_to_keep" in self._parameters and feed.scores is None:
            options["logits_to_keep"] = 1
        logits: torch.Tensor = self._model(torch.tensor([feed.token_ids], device=self.device), **options).logits[0]
        place.length = stop
        if feed.scores is not None:
            feed.scores.add(logits)
        return logits[-1].float() if feed.ends else None
