"""The prompts with which a run shows what it has learnt, as token ids. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.records import first_record, kind_of
from training.render import Renderer, RenderError

if TYPE_CHECKING:
    from training.spec import TrainSpec
    from training.storage import Storage


class PromptError(ValueError):
    """A prompt that the base cannot be asked; the message is for the user."""


def encode_prompts(spec: TrainSpec, storage: Storage, renderer: Renderer, max_context: int) -> list[list[int]]:
    """Each as the training file's records begin: a user's message where they are conversations, otherwise raw text."""
    if not spec.sample_prompts:
        return []
    is_chat = _are_conversations(spec, storage)
    encoded = [_encode(prompt, renderer, is_chat) for prompt in spec.sample_prompts]
    for number, ids in enumerate(encoded):
        if not 0 < len(ids) < max_context:
            raise PromptError(f"Sample prompt {number} has {len(ids)} tokens; it may have 1 to {max_context - 1}.")
    return encoded


def _encode(prompt: str, renderer: Renderer, is_chat: bool) -> list[int]:
    if not is_chat:
        return renderer.encode_text(prompt)
    try:
        return renderer.encode_prompt([{"role": "user", "content": prompt}])
    except RenderError as error:
        raise PromptError(f"The chat template cannot express a sample prompt: {error}") from error


def _are_conversations(spec: TrainSpec, storage: Storage) -> bool:
    with storage.open_read(spec.training_key) as file:
        first = first_record(file)
    return first is not None and kind_of(first) in ("chat", "preference")
