"""The step loop for models off the fast path: prompts are read one by one, then all sequences decode as one batch.

Works for every model that can generate from a left-padded batch; see `row_cache`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from service.engine.native import loop_attention
from service.engine.native.linear import fuse_head, fuse_single, linear_layers
from service.engine.native.lora import AdapterStack, LoadedAdapter, Piece
from service.engine.native.row_cache import RowCache
from service.engine.native.runner import Feed, context_of


@dataclass(eq=False)
class LoopPlace:
    """A sequence: first with a cache of its own, then in a row of the batch."""

    length: int = 0
    cache: DynamicCache | None = field(default_factory=DynamicCache)
    is_open: bool = True


def keeps_keys_and_values(model: PreTrainedModel) -> bool:
    """Whether that is all that the model's layers keep of each token, so that sequences can be joined in a batch."""
    cache = DynamicCache(config=model.config)
    name = "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"
    model(torch.tensor([[0]], device=model.device), use_cache=True, **{name: cache})
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return all(isinstance(layer, kinds) and type(layer) in kinds and layer.is_initialized for layer in cache.layers)


class LoopRunner:
    """A model and the rows that it continues."""

    reads_in_pieces = True

    def __init__(self, model: PreTrainedModel, *, max_rows: int, with_adapters: bool) -> None:
        self.device = model.device
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
        self.max_context = context_of(model)
        self._model = model
        self._stack, self._head_stack = AdapterStack(model), AdapterStack(model)
        loop_attention.install(model)
        fuse_head(model, self._head_stack)
        fuse_single(model, self._stack)
        self.layers = linear_layers(model) if with_adapters else {}
        parameters = inspect.signature(model.forward).parameters
        self._has_positions = "position_ids" in parameters
        self._last_logits = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._cache = RowCache(max_rows, self.device)
        self._rows: list[LoopPlace] = []  # who sits where in the batch

    def open(self, token_ids: Sequence[int], adapter: LoadedAdapter | None, *, anew: bool) -> LoopPlace:
        """See Runner; there is always room for as many rows as the scheduler admits."""
        return LoopPlace()

    def grow(self, place: LoopPlace, num_tokens: int) -> bool:
        """See Runner."""
        return True

    def keep(self, place: LoopPlace, token_ids: Sequence[int], adapter: LoadedAdapter | None) -> None:
        """Nothing is remembered."""

    def close(self, place: LoopPlace) -> None:
        """See Runner; the row is free at the next pass."""
        place.is_open = False

    def forward(self, feeds: Sequence[Feed]) -> torch.Tensor:
        """See Runner."""
        found: dict[int, torch.Tensor] = {}
        newest = []
        for feed in feeds:
            if feed.place in self._rows or (feed.place.length and len(feed.token_ids) == 1):
                newest.append(feed)
            elif (logits := self._read(feed)) is not None:
                found[id(feed)] = logits
        if newest:
            self._seat([feed.place for feed in newest])
            found |= self._decode(newest)
        for feed in feeds:
            feed.place.length += len(feed.token_ids)
        wanted = [found[id(feed)] for feed in feeds if feed.ends]
        return torch.stack(wanted) if wanted else torch.empty(0, self.vocab_size, device=self.device)

    def _read(self, feed: Feed) -> torch.Tensor | None:
        """A piece of one prompt, into a cache of its own; the logits [vocabulary] after its end."""
        place: LoopPlace = feed.place
        assert place.cache is not None
        start, stop = place.length, place.length + len(feed.token_ids)
        pieces = [Piece(slice(0, len(feed.token_ids)), feed.adapter)] if feed.adapter is not None else []
        self._stack.set_plan([], pieces)
        reads_all = feed.scores is not None or not self._last_logits
        self._head_stack.set_plan([feed.adapter] * (len(feed.token_ids) if reads_all else 1), [])
        positions = torch.arange(start, stop, device=self.device).unsqueeze(0)
        mask = torch.ones(1, stop, dtype=torch.bool, device=self.device)
        token_ids = torch.tensor([feed.token_ids], device=self.device)
        which = {} if feed.scores is not None else self._last_logits
        logits = self._forward(token_ids, positions, mask, place.cache, which)[0]
        if feed.scores is not None:
            feed.scores.add(logits)
        return logits[-1].float() if feed.ends else None

    def _seat(self, wanted: list[LoopPlace]) -> None:
        """Close the gaps of sequences that have ended, then give rows to those that decode for the first time."""
        moves = []
        for number in reversed(range(len(self._rows))):
            if not self._rows[number].is_open:
                last = self._rows.pop()
                if number < len(self._rows):
                    self._rows[number] = last
                    moves.append((len(self._rows), number))
        seated = set(map(id, self._rows))
        newcomers = [place for place in wanted if id(place) not in seated]
        if not moves and not newcomers and len(self._rows) == self._cache.num_rows:
            return
        for source, target in moves:
            self._cache.rearrange([(source, target)], [], self._cache.num_rows)
        seats = []
        for place in newcomers:
            assert place.cache is not None
            seats.append((len(self._rows), place.cache, place.length))
            self._rows.append(place)
        self._cache.rearrange([], seats, len(self._rows))
        for place in newcomers:
            place.cache = None

    def _decode(self, feeds: list[Feed]) -> dict[int, torch.Tensor]:
        """The newest token of every row; logits [vocabulary] by feed."""
        by_place = {id(feed.place): feed for feed in feeds}
        in_order = [by_place[id(place)] for place in self._rows]
        for stack in (self._stack, self._head_stack):
            stack.set_plan([feed.adapter for feed in in_order], [])
        token_ids = torch.tensor([feed.token_ids for feed in in_order], device=self.device)
        positions, mask = self._cache.advance()
        logits = self._forward(token_ids, positions, mask, self._cache, self._last_logits)[:, -1].float()
        return {id(feed): row for feed, row in zip(in_order, logits, strict=True)}

    def _forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
        cache: DynamicCache | RowCache,
        which: dict[str, int],
    ) -> torch.Tensor:
        """Logits [rows, positions, vocabulary]; `which` names fewer positions to models that can be told."""
        where = {"position_ids": positions} if self._has_positions else {}
        output = self._model(
            input_ids=token_ids, attention_mask=mask, past_key_values=cache, use_cache=True, **where, **which
        )
        logits: torch.Tensor = output.logits
        return logits
