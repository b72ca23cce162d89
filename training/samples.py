"""What the current weights answer to the spec's sample prompts: greedy, short, and without a trace in the run."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import DynamicCache

from training.attention import PACKED
from training.failure import Failure, is_out_of_memory
from training.model_shape import ModelShape
from training.render import Renderer
from training.sample_prompts import PromptError, encode_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from training.spec import TrainSpec
    from training.storage import Storage

MAX_NEW_TOKENS = 64
MAX_S = 60.0  # other workers wait meanwhile, and a collective call of theirs must not time out


@dataclass(frozen=True)
class Samples:
    """The prompts of one run."""

    texts: tuple[str, ...]
    prompts: list[list[int]]
    renderer: Renderer
    max_context: int

    @classmethod
    def load(cls, spec: TrainSpec, storage: Storage, base_folder: Path) -> Samples:
        """Failure if the base cannot be asked; planning refuses these prompts before."""
        renderer, max_context = Renderer.load(base_folder), ModelShape(base_folder).max_context
        try:
            prompts = encode_prompts(spec, storage, renderer, max_context)
        except PromptError as error:
            raise Failure("invalid_value", str(error), "sample_prompts") from error
        return cls(spec.sample_prompts, prompts, renderer, max_context)

    def generate(self, model: PreTrainedModel) -> list[tuple[str, str]] | None:
        """Pairs of prompt and answer; None if there is no memory for it, which is no reason to end a run. Random state
        and gradients stay as they are, so a run with samples is the run without them."""
        if not self.prompts:
            return []
        num_new = min(MAX_NEW_TOKENS, self.max_context - max(map(len, self.prompts)))
        try:
            with _as_served(model):
                answers = _continue(model, self.prompts, self.renderer.stop_token_ids, num_new)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None
        return list(zip(self.texts, map(self.renderer.tokenizer.decode, answers), strict=True))


@contextmanager
def _as_served(model: PreTrainedModel) -> Iterator[None]:
    """Without dropout, and with an attention that reads a cache: the packed one sees whole examples only."""
    is_packed = model.config._attn_implementation == PACKED
    if is_packed:
        model.set_attn_implementation("sdpa")
    model.eval()
    try:
        yield
    finally:
        model.train()
        if is_packed:
            model.set_attn_implementation(PACKED)


@torch.no_grad()
def _continue(
    model: PreTrainedModel, prompts: list[list[int]], stop_token_ids: tuple[int, ...], num_new: int
) -> list[list[int]]:
    """The likeliest continuations, all rows together, padded on the left; the tokens that end them are left off."""
    longest, device = max(map(len, prompts)), model.device
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    stops = torch.tensor(stop_token_ids, dtype=torch.long, device=device)
    has_ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"past_key_values": DynamicCache(config=model.config), "use_cache": True}
    chosen: list[torch.Tensor] = []
    give_up_at = time.monotonic() + MAX_S
    while len(chosen) < num_new and not has_ended.all() and time.monotonic() < give_up_at:
        given = {"position_ids": (mask.cumsum(dim=1) - 1).clamp_min(0)[:, -ids.shape[1] :], "logits_to_keep": 1}
        options |= {name: value for name, value in given.items() if name in accepted}
        ids = model(input_ids=ids, attention_mask=mask, **options).logits[:, -1:].argmax(dim=-1)
        has_ended |= torch.isin(ids[:, 0], stops)
        chosen.append(torch.where(has_ended, -1, ids[:, 0]))
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    rows = cast(list[list[int]], torch.stack(chosen, dim=1).tolist())
    return [[token for token in row if token >= 0] for row in rows]
