"""LoRA adapters of one base model: the layers that apply them, and which of them are resident.

A batch may mix adapters and ranks: its rows are sorted by adapter, and each linear layer adds every adapter's product
to that adapter's slice of rows. A batch without adapters pays one `if` per layer.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from service.engine.protocol import AdapterMismatch, AdapterRef

_PREFIX = "base_model.model."
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "use_qalora",
    "layer_replication",
)


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter's weights on the device: module name to A^T [in, rank] and B^T [rank, out], the scale inside B."""

    id: str
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass
class ActiveAdapters:
    """The adapters of the forward that runs now, each with its rows; shared by all layers of a model."""

    groups: list[tuple[slice, LoadedAdapter]] = field(default_factory=list)


class LoraLinear(nn.Module):
    """Stands in for an `nn.Linear` or `Conv1D`, with the same parameters under the same names."""

    def __init__(self, base: nn.Linear | Conv1D, name: str, active: ActiveAdapters) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self._transposed = isinstance(base, Conv1D)
        self._name, self._active = name, active
        rows, columns = base.weight.shape
        self.in_features, self.out_features = (rows, columns) if self._transposed else (columns, rows)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.T if self._transposed else self.weight
        y = F.linear(x, weight, self.bias)
        if self._active.groups:
            for rows, adapter in self._active.groups:
                if (pair := adapter.pairs.get(self._name)) is not None:
                    y[rows] += (x[rows] @ pair[0]) @ pair[1]
        return y


def attach(model: nn.Module, active: ActiveAdapters) -> dict[str, LoraLinear]:
    """Replace every linear layer of the model; returns them by name."""
    layers: dict[str, LoraLinear] = {}
    for name, module in list(model.named_modules()):
        if type(module) in (nn.Linear, Conv1D):
            layers[name] = LoraLinear(module, name, active)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layers[name])
    return layers


def load_adapter(ref: AdapterRef, layers: dict[str, LoraLinear]) -> LoadedAdapter:
    """Read and check an adapter's folder. AdapterMismatch says what does not fit."""
    try:
        config = json.loads((ref.folder / "adapter_config.json").read_text())
        weights = load_file(ref.folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterMismatch(f"adapter {ref.id} cannot be read: {error}") from error
    if config.get("peft_type") != "LORA":
        raise AdapterMismatch(f"adapter {ref.id} is of type {config.get('peft_type')}; this engine runs LORA")
    if asked := [name for name in _UNSUPPORTED if config.get(name)]:
        raise AdapterMismatch(f"adapter {ref.id} uses {', '.join(asked)}, which this engine does not run")
    if config.get("bias", "none") != "none":
        raise AdapterMismatch(f"adapter {ref.id} trains biases, which this engine does not run")
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in sorted({_module_name(ref, key) for key in weights}):
        a, b = (weights.get(f"{_PREFIX}{name}.lora_{side}.weight") for side in "AB")
        if (layer := layers.get(name)) is None:
            raise AdapterMismatch(f"adapter {ref.id} targets {name}, which is no linear layer of this base model")
        if a is None or b is None:
            raise AdapterMismatch(f"adapter {ref.id} has only one of lora_A and lora_B for {name}")
        pairs[name] = _pair(ref, name, layer, a, b, config)
    if not pairs:
        raise AdapterMismatch(f"adapter {ref.id} holds no weights")
    return LoadedAdapter(ref.id, pairs)


def _module_name(ref: AdapterRef, key: str) -> str:
    match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_[AB]\.weight", key)
    if match is None:
        raise AdapterMismatch(f"adapter {ref.id} holds {key}, which is no LoRA weight of a linear layer")
    return match[1]


def _pair(
    ref: AdapterRef, name: str, layer: LoraLinear, a: torch.Tensor, b: torch.Tensor, config: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two factors of one layer, checked against it, in its dtype and on its device."""
    rank = a.shape[0]
    wanted = ((rank, layer.in_features), (layer.out_features, rank))
    if (tuple(a.shape), tuple(b.shape)) != wanted:
        raise AdapterMismatch(
            f"adapter {ref.id} has factors of shape {tuple(a.shape)} and {tuple(b.shape)} for {name}; "
            f"this base model needs {wanted[0]} and {wanted[1]}"
        )
    alpha = _by_pattern(name, config.get("alpha_pattern"), config.get("lora_alpha", 8))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    like = layer.weight
    return a.T.to(like).contiguous(), (b.T.float() * scale).to(like).contiguous()


def _by_pattern(name: str, pattern: dict[str, float] | None, default: float) -> float:
    """PEFT's rule: the first key that is a name, or the end of one after a dot, as a regular expression."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default
