"""Encoders without a head: loading one from a base folder, and the embeddings of a micro-batch.

Texts are read without padding where the architecture allows it, and pooled as the folder says (see `training.pooling`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoModel

from training.attention import PACKED
from training.classifier import PACKED_TYPES, first_position
from training.failure import Failure
from training.pooling import Pooling, PoolingError, read_pooling
from training.pretrained import load_pretrained
from training.rows import packed_row, padded_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from training.batches import MicroBatch


def load_embedder(folder: Path, seed: int, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The base without the head of its pre-training; `embeddings` finds its pooling in `model.pooling`. A pooler, which
    no embedding uses, may be missing, and is the same everywhere with the same seed. Failure if other weights are."""
    torch.manual_seed(seed)
    try:
        pooling = read_pooling(folder)
    except PoolingError as error:
        raise Failure("invalid_base_model", f"The base model cannot be loaded: {error}", "model") from error
    model, missing = load_pretrained(AutoModel, folder, dtype, device, packed_types=PACKED_TYPES)
    if lost := [name for name in sorted(missing) if not name.startswith("pooler.")]:
        raise Failure("invalid_base_model", f"The base model has no weights for {lost[0]}.", "model")
    cast(Any, model).pooling = pooling
    return model


def embeddings(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """float32 [sequences, width], in the order of the examples; not yet of unit length."""
    states = _packed_states(model, batch) if model.config._attn_implementation == PACKED else _states(model, batch)
    pooling = cast(Pooling, model.pooling)
    pooled = torch.stack([_pool(tokens.float(), pooling) for tokens in states])
    return pooled[list(batch.places)]


def _pool(states: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """[width] of one sequence's token states [tokens, width]."""
    if pooling.mode == "cls":
        return states[0]
    return states.amax(dim=0) if pooling.mode == "max" else states.mean(dim=0)


def _packed_states(model: PreTrainedModel, batch: MicroBatch) -> tuple[torch.Tensor, ...]:
    """All texts in one row, kept apart by attention and by their positions."""
    row = packed_row(batch)
    states = model(
        input_ids=row.input_ids, position_ids=row.positions + first_position(model), example_lengths=row.lengths
    ).last_hidden_state[0]
    return states.split(row.lengths)[: len(batch.lengths)]


def _states(model: PreTrainedModel, batch: MicroBatch) -> list[torch.Tensor]:
    """Texts of similar lengths together, padded on the right."""
    found: list[torch.Tensor] = []
    for rows in padded_rows(batch, model.config.pad_token_id or 0):
        states = model(input_ids=rows.input_ids, attention_mask=rows.mask).last_hidden_state
        found += [row[:length] for row, length in zip(states, rows.lengths, strict=True)]
    return found
