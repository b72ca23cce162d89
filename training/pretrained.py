"""Loading a model from a folder as every run does: offline, safetensors only, none of its code, ready to train."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging as transformers_logging

from training.attention import PACKED
from training.failure import Failure
from training.model_shape import read_json
from training.norm_and_rotary import use_few_kernels

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_pretrained(
    auto: Any, folder: Path, dtype: torch.dtype, device: torch.device, *, packed_types: Collection[str], **options: Any
) -> tuple[PreTrainedModel, set[str]]:
    """The model that transformers' `auto` class makes of the folder, and the names of its weights that are not there.
    It reads packed rows if its type is one of `packed_types`. Failure if it cannot be loaded."""
    config = read_json(folder / "config.json")
    packed = config.get("model_type") in packed_types and not config.get("use_bidirectional_attention")
    transformers_logging.disable_progress_bar()
    try:
        model, info = auto.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **options,
            **({"attn_implementation": PACKED} if packed else {}),
        )
    except (ValueError, KeyError) as error:  # an architecture that this transformers does not know, or a broken config
        raise Failure("invalid_base_model", f"The base model cannot be loaded: {error}", "model") from error
    torch.nn.Module.to(model, device)
    if device.type == "cpu":
        use_few_kernels(model)
    return model.train(), set(info["missing_keys"])
