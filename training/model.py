"""A language model: loading it from a folder, and what it thinks of a micro-batch. LoRA is in `training.lora`, models
with a label head are in `training.classifier`, encoders without a head in `training.embedder`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM

from training.attention import PACKED, PACKED_MODEL_TYPES
from training.pretrained import load_pretrained
from training.rows import num_until_known_shape, packed_row
from training.token_logprobs import token_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from training.batches import MicroBatch

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The base model in `dtype`, ready to train on packed rows where its architecture allows it."""
    model, _ = load_pretrained(AutoModelForCausalLM, folder, dtype, device, packed_types=PACKED_MODEL_TYPES)
    model.config.use_cache = False
    return model


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype in which a folder keeps its weights (that of its first floating-point tensor)."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a dict)
                dtype = _DTYPES.get(weights.get_slice(name).get_dtype())
                if dtype is not None:
                    return dtype
    return torch.float32


def kept_logprobs(model: PreTrainedModel, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities fp32 [kept positions] of a micro-batch's targets, and whether each is the likeliest token. The
    vocabulary is never spread over positions that have no loss."""
    if model.config._attn_implementation != PACKED:
        return token_logprobs(_padded_logits(model, batch), batch.targets)
    row, kept = packed_row(batch), batch.keep.nonzero().squeeze(1)
    if kept.device.type == "cpu":
        kept = pad(kept, (0, num_until_known_shape(len(kept))))
    logits = model(
        input_ids=row.input_ids,
        position_ids=row.positions,
        logits_to_keep=kept,
        example_lengths=row.lengths,
        use_cache=False,
    ).logits
    return token_logprobs(logits[0], batch.targets)


def _padded_logits(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """One row per example, padded on the right, where no causal position looks."""
    rows = [x.split(batch.lengths) for x in (batch.input_ids, batch.keep)]
    input_ids, keep = (torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True) for parts in rows)
    lengths = torch.tensor(batch.lengths, device=input_ids.device)
    mask = torch.arange(input_ids.shape[1], device=input_ids.device)[None] < lengths[:, None]
    logits = model(input_ids=input_ids, attention_mask=mask.long(), logits_to_keep=keep, use_cache=False).logits
    return logits if logits.ndim == 2 else logits[keep]
