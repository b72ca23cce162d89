"""Reading LoRA adapters: from a folder of the PEFT layout to checked factors. `lora` applies them."""

from __future__ import annotations

import json
import math
import mmap
import re
from contextlib import suppress
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from service.engine.native.linear import Linear
from service.engine.native.lora import Factors, LoadedAdapter
from service.engine.protocol import AdapterMismatch, AdapterRef

PREFIX = "base_model.model."  # of all names in a PEFT file
_TINY = 1e-15  # length below which a row of weights counts as zeros
_UNSUPPORTED = (
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "use_qalora",
    "layer_replication",
)


def load_adapter(ref: AdapterRef, layers: dict[str, Linear]) -> LoadedAdapter:
    """Read and check an adapter's folder. AdapterMismatch says what does not fit."""
    try:
        config = json.loads((ref.folder / "adapter_config.json").read_text())
        # Not `load_file`, of which 3 kB stay behind each time (safetensors 0.8).
        weights = load((ref.folder / "adapter_model.safetensors").read_bytes())
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterMismatch(f"adapter {ref.id} cannot be read: {error}") from error
    if config.get("peft_type") != "LORA":
        raise AdapterMismatch(f"adapter {ref.id} is of type {config.get('peft_type')}; this engine runs LORA")
    if asked := [name for name in _UNSUPPORTED if config.get(name)]:
        raise AdapterMismatch(f"adapter {ref.id} uses {', '.join(asked)}, which this engine does not run")
    if config.get("bias", "none") != "none":
        raise AdapterMismatch(f"adapter {ref.id} trains biases, which this engine does not run")
    factors: dict[str, Factors] = {}
    for name in sorted({_module_name(ref, key) for key in weights}):
        a, b = (weights.get(f"{PREFIX}{name}.lora_{side}.weight") for side in "AB")
        magnitude = weights.get(f"{PREFIX}{name}.lora_magnitude_vector")
        if (layer := layers.get(name)) is None:
            raise AdapterMismatch(f"adapter {ref.id} targets {name}, which is no linear layer of this base model")
        if a is None or b is None:
            raise AdapterMismatch(f"adapter {ref.id} has only one of lora_A and lora_B for {name}")
        if (magnitude is not None) != bool(config.get("use_dora")):
            raise AdapterMismatch(f"adapter {ref.id}: use_dora and lora_magnitude_vector do not agree for {name}")
        factors[name] = _factors(ref, name, layer, a, b, magnitude, config)
    if not factors:
        raise AdapterMismatch(f"adapter {ref.id} holds no weights")
    return LoadedAdapter(ref.id, _together(factors))


def _together(factors: dict[str, Factors]) -> dict[str, Factors]:
    """The same in one piece of memory."""
    parts = [part for of_layer in factors.values() for part in (of_layer.down, of_layer.up)]
    sizes = [part.numel() for part in parts]
    copies = torch.cat([part.flatten() for part in parts], out=_room(sum(sizes), like=parts[0])).split(sizes)
    views = [copy.view(part.shape) for copy, part in zip(copies, parts, strict=True)]
    pairs = zip(views[::2], views[1::2], strict=True)
    return {name: Factors(*pair, of_layer.gain) for (name, of_layer), pair in zip(factors.items(), pairs, strict=True)}


def _room(num: int, like: torch.Tensor) -> torch.Tensor:
    """[num] to be written. On a CPU pages of its own, given back when it is dropped: blocks that come and go between
    those of others would leave gaps as large as they are."""
    if not like.is_cpu:
        return like.new_empty(num)
    pages = mmap.mmap(-1, num * like.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # no huge pages here; a step reads all of it, so they save look-ups
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=like.dtype)


def _module_name(ref: AdapterRef, key: str) -> str:
    match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.(?:lora_[AB]\.weight|lora_magnitude_vector)", key)
    if match is None:
        raise AdapterMismatch(f"adapter {ref.id} holds {key}, which is no LoRA weight of a linear layer")
    return match[1]


def _factors(
    ref: AdapterRef,
    name: str,
    layer: Linear,
    a: torch.Tensor,
    b: torch.Tensor,
    magnitude: torch.Tensor | None,
    config: dict[str, Any],
) -> Factors:
    """The factors of one layer, checked against it, in its dtype and on its device."""
    rank = a.shape[0]
    out_features, in_features = layer.shape
    wanted = ((rank, in_features), (out_features, rank))
    if (tuple(a.shape), tuple(b.shape)) != wanted:
        raise AdapterMismatch(
            f"adapter {ref.id} has factors of shape {tuple(a.shape)} and {tuple(b.shape)} for {name}; "
            f"this base model needs {wanted[0]} and {wanted[1]}"
        )
    if magnitude is not None and tuple(magnitude.shape) != (out_features,):
        raise AdapterMismatch(
            f"adapter {ref.id} has magnitudes of shape {tuple(magnitude.shape)} for {name}; "
            f"this base model needs ({out_features},)"
        )
    scale, like = scale_of(name, rank, config), layer.like
    gain = None if magnitude is None else gain_of(merged_rows(layer.rows, a, b, scale), magnitude)
    return Factors(a.to(like).contiguous(), (b.T.float() * scale).to(like).contiguous(), gain)


def scale_of(name: str, rank: int, config: dict[str, Any]) -> float:
    """What a layer's B A is multiplied by: alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023)."""
    alpha = _by_pattern(name, config.get("alpha_pattern"), config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


@torch.no_grad()
def merged_rows(rows: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """fp32 W + scale * B A of a weight [out, in], row by row an output."""
    weight = rows.float()
    return weight + scale * (b.to(weight) @ a.to(weight))


@torch.no_grad()
def gain_of(merged: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """fp32 [out]: what DoRA (Liu et al. 2024) multiplies each row of the sum by, to bring it to its magnitude."""
    return magnitude.to(merged) / torch.linalg.vector_norm(merged, dim=1).clamp_min(_TINY)


def _by_pattern(name: str, pattern: dict[str, float] | None, default: float) -> float:
    """PEFT's rule: the first key that is a name, or the end of one after a dot, as a regular expression."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
