"""A language model: loading it from a folder, and its logits for a micro-batch. LoRA is in `training.lora`, models with
a label head are in `training.classifier`, encoders without a head in `training.embedder`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from training.attention import PACKED, PACKED_MODEL_TYPES
from training.failure import Failure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from training.batches import MicroBatch

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The base model in `dtype`, ready to train on packed rows where its architecture allows it."""
    config = json.loads((folder / "config.json").read_text())
    packed = config.get("model_type") in PACKED_MODEL_TYPES and not config.get("use_bidirectional_attention")
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            **({"attn_implementation": PACKED} if packed else {}),
        )
    except (ValueError, KeyError) as error:  # an architecture that this transformers does not know, or a broken config
        raise Failure("invalid_base_model", f"The base model cannot be loaded: {error}", "model") from error
    model.config.use_cache = False
    torch.nn.Module.to(model, device)
    return model.train()


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype in which a folder keeps its weights (that of its first floating-point tensor)."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a dict)
                dtype = _DTYPES.get(weights.get_slice(name).get_dtype())
                if dtype is not None:
                    return dtype
    return torch.float32


def kept_logits(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """Logits [kept positions, vocabulary]; the vocabulary is never spread over positions that have no loss."""
    if model.config._attn_implementation != PACKED:
        return _padded_logits(model, batch)
    num_kept, kept = len(batch.targets), batch.keep.nonzero().squeeze(1)
    input_ids, lengths = batch.input_ids, batch.lengths
    if batch.input_ids.device.type == "cpu":
        num_more = _num_until_known_shape(len(input_ids))
        input_ids = pad(input_ids, (0, num_more))
        lengths += (num_more,) if num_more else ()  # one more sequence, of which nothing is kept
        kept = pad(kept, (0, _num_until_known_shape(num_kept)))
    positions = torch.cat([torch.arange(length) for length in lengths]).to(input_ids.device)
    logits = model(
        input_ids=input_ids[None],
        position_ids=positions[None],
        logits_to_keep=kept,
        example_lengths=lengths,
        use_cache=False,
    ).logits
    return logits[0, :num_kept]


def _num_until_known_shape(num_rows: int) -> int:
    """How many rows are missing to one of few numbers of rows, at most one in 16 of many.

    On a CPU, oneDNN compiles a matrix product anew for every shape that it meets (2 ms) and keeps it (0.5 MB)."""
    multiple = min(512, max(64, (1 << num_rows.bit_length()) // 32))
    return -num_rows % multiple


def _padded_logits(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """One row per example, padded on the right, where no causal position looks."""
    rows = [x.split(batch.lengths) for x in (batch.input_ids, batch.keep)]
    input_ids, keep = (torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True) for parts in rows)
    lengths = torch.tensor(batch.lengths, device=input_ids.device)
    mask = torch.arange(input_ids.shape[1], device=input_ids.device)[None] < lengths[:, None]
    logits = model(input_ids=input_ids, attention_mask=mask.long(), logits_to_keep=keep, use_cache=False).logits
    return logits if logits.ndim == 2 else logits[keep]
