"""Encoders without a head: loading one from a base folder, and the embeddings of a micro-batch.

Texts are read without padding where the architecture allows it, and pooled as the folder says (see `training.pooling`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from training.attention import PACKED
from training.classifier import first_position, groups, is_packed
from training.failure import Failure
from training.model_shape import read_json
from training.packed_row import packed_row
from training.pooling import Pooling, read_pooling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from training.batches import MicroBatch


def load_embedder(folder: Path, seed: int, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The base without the head of its pre-training; `embeddings` finds its pooling in `model.pooling`. A pooler, which
    no embedding uses, may be missing, and is the same everywhere with the same seed. Failure if other weights are."""
    transformers_logging.disable_progress_bar()
    torch.manual_seed(seed)
    try:
        pooling = read_pooling(folder)
        model, info = AutoModel.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **({"attn_implementation": PACKED} if is_packed(read_json(folder / "config.json")) else {}),
        )
    except (ValueError, KeyError) as error:  # an architecture that this transformers does not know, or a broken config
        raise Failure("invalid_base_model", f"The base model cannot be loaded: {error}", "model") from error
    if lost := [name for name in sorted(info["missing_keys"]) if not name.startswith("pooler.")]:
        raise Failure("invalid_base_model", f"The base model has no weights for {lost[0]}.", "model")
    model.pooling = pooling
    nn.Module.to(model, device)
    return model.train()


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
    texts, found = batch.input_ids.split(batch.lengths), []
    for first, end in groups(batch.lengths):
        input_ids = pad_sequence(list(texts[first:end]), batch_first=True, padding_value=model.config.pad_token_id or 0)
        lengths = torch.tensor(batch.lengths[first:end], device=input_ids.device)
        mask = (torch.arange(input_ids.shape[1], device=input_ids.device)[None] < lengths[:, None]).long()
        states = model(input_ids=input_ids, attention_mask=mask).last_hidden_state
        found += [row[:length] for row, length in zip(states, batch.lengths[first:end], strict=True)]
    return found
