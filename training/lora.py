"""LoRA, rsLoRA and DoRA of our own: layers, injection, and the PEFT layout in which adapters are stored."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import dropout, linear
from transformers.pytorch_utils import Conv1D

from training.artifact import canonical_json
from training.failure import Failure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from training.spec import LoraSpec

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TINY = 1e-30  # so that a row of zeros stays one instead of becoming 0 / 0
_PARTS = {"lora_A": ".weight", "lora_B": ".weight", "lora_magnitude_vector": ""}


class LoraLinear(nn.Module):
    """A frozen linear layer W plus scale * B @ A. A and B are fp32 masters, computed with in the input's dtype.

    With DoRA each row of the sum is brought to a trained length, its magnitude, which starts as the length of W's row.
    """

    row_squares: torch.Tensor  # fp32 [out]: squared lengths of W's rows

    def __init__(self, base: nn.Module, in_features: int, out_features: int, spec: LoraSpec) -> None:
        super().__init__()
        self.base = base
        self.scale, self.dropout, self.enabled = scale_of(spec), spec.dropout, True
        device, rank = next(base.parameters()).device, cast(int, spec.rank)
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device))
        self.register_parameter("lora_magnitude_vector", None)
        if spec.dora:
            self.register_buffer("row_squares", _rows(base).float().square().sum(dim=1), persistent=False)
            self.lora_magnitude_vector = nn.Parameter(self.row_squares.sqrt())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x W^T + scale * (x A^T) B^T, and with DoRA each output times magnitude / length of its row."""
        if not self.enabled:
            return self.base(x)
        bias = cast("torch.Tensor | None", self.base.bias)
        dropped = dropout(x, self.dropout, self.training) if self.dropout else x
        y: torch.Tensor = _AdaptedProduct.apply(
            x, dropped, _rows(self.base), bias, self.lora_A, self.lora_B, self.scale
        )
        if self.lora_magnitude_vector is None:
            return y
        gain = self.lora_magnitude_vector / self._row_lengths()  # fp32: near 1, where bf16 has steps of half a percent
        return (y * gain if bias is None else (y - bias) * gain + bias).to(x.dtype)

    @torch.no_grad()
    def _row_lengths(self) -> torch.Tensor:
        """Lengths [out] of the rows of W + scale * B A; constants to the gradient, as in section 4.3 of the paper.

        |w + s b A|^2 = |w|^2 + 2 s (w A^T) b + s^2 b (A A^T) b, row by row: no matrix of W's size is made.
        """
        weight, a, b = _rows(self.base), self.lora_A, self.lora_B
        cross = linear(weight, a.to(weight.dtype)).float()
        mixed = (2 * self.scale * cross + self.scale**2 * (b @ (a @ a.T))) * b
        return (self.row_squares + mixed.sum(dim=1)).clamp_min(_TINY).sqrt()


class _AdaptedProduct(torch.autograd.Function):
    """x W^T + bias + scale * (dropped A^T) B^T with W and bias frozen. Low-rank products are added where the large ones
    have been written: a sum of its own would cost more than they do."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        dropped: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        y = linear(x, weight, bias)
        inputs, low_a, low_b = dropped.flatten(0, -2), a.to(x.dtype), b.to(x.dtype)
        low = inputs @ low_a.T
        y.view(-1, y.shape[-1]).addmm_(low, low_b.T, alpha=scale)
        ctx.save_for_backward(inputs, low, weight, low_a, low_b)
        ctx.scale, ctx.has_dropped = scale, dropped is not x
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inputs, low, weight, a, b = ctx.saved_tensors
        upstream = grads[0].flatten(0, -2)
        d_low = (upstream @ b).mul_(ctx.scale)
        d_a, d_b = d_low.T @ inputs, (upstream.T @ low).mul_(ctx.scale)
        d_x = d_dropped = None
        shape = (*grads[0].shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[0]:
            d_x = upstream @ weight
            if ctx.has_dropped:
                d_dropped = (d_low @ a).view(shape)
            else:
                d_x.addmm_(d_low, a)
            d_x = d_x.view(shape)
        return d_x, d_dropped, None, None, d_a.float(), d_b.float(), None


def scale_of(spec: LoraSpec) -> float:
    """The factor before B A; "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" divides by the root."""
    rank, alpha = cast(int, spec.rank), cast(float, spec.alpha)
    return alpha / (math.sqrt(rank) if spec.rslora else rank)


def inject(model: PreTrainedModel, spec: LoraSpec, seed: int, whole: tuple[str, ...] = ()) -> list[str]:
    """Freeze the model and wrap its target layers; returns their names. The same seed gives the same A everywhere.
    Modules named in `whole`, such as a new head, are trained with all their weights, in fp32."""
    model.requires_grad_(False)
    for name in whole:
        _train_whole(model.get_submodule(name))
    generator = torch.Generator().manual_seed(seed)
    names = _target_names(model, spec, whole)
    for name in names:
        base = model.get_submodule(name)
        out_features, in_features = _rows(base).shape
        layer = LoraLinear(base, in_features, out_features, spec)
        start = nn.init.kaiming_uniform_(torch.empty(layer.lora_A.shape), a=math.sqrt(5), generator=generator)
        layer.lora_A.data.copy_(start)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return names


def _train_whole(module: nn.Module) -> None:
    module.float().requires_grad_(True)
    module.register_forward_pre_hook(lambda _, inputs: tuple(x.float() for x in inputs))


@contextmanager
def adapter_off(model: PreTrainedModel) -> Iterator[None]:
    """The model as it was before `inject`; nothing changes for a model without an adapter."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def _rows(layer: nn.Module) -> torch.Tensor:
    """The weight as [out, in]; GPT-2's Conv1D keeps it the other way round."""
    weight = cast(torch.Tensor, layer.weight)
    return weight.T if isinstance(layer, Conv1D) else weight


def _target_names(model: PreTrainedModel, spec: LoraSpec, whole: tuple[str, ...]) -> list[str]:
    """Linear layers that the spec names; the output head is never one of them, nor is a part of a module that is
    trained whole. Failure if a target matches nothing."""
    head = model.get_output_embeddings()
    outside = {id(head), *(id(module) for name in whole for module in model.get_submodule(name).modules())}
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and id(m) not in outside]
    if spec.targets == "all-linear":
        return linears
    for target in spec.targets:
        if not any(_matches(name, target) for name in linears):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            message = f"No linear layer of the base model is called {target!r}; it has: {known}."
            raise Failure("invalid_lora_target", message, "adapter.targets")
    return [name for name in linears if any(_matches(name, target) for target in spec.targets)]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def adapter_config(model: PreTrainedModel, spec: LoraSpec, base_id: str) -> dict[str, Any]:
    """The adapter's configuration in PEFT's words."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    whole = _trained_whole(model)
    writes = model.get_output_embeddings() is not None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if writes else "SEQ_CLS" if whole else "FEATURE_EXTRACTION",
        "base_model_name_or_path": base_id,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "use_rslora": spec.rslora,
        "use_dora": spec.dora,
        "lora_dropout": spec.dropout,
        "target_modules": sorted({name.rpartition(".")[2] for name in layers})
        if spec.targets == "all-linear"
        else sorted(spec.targets),
        "fan_in_fan_out": any(isinstance(layer.base, Conv1D) for layer in layers.values()),
        "bias": "none",
        "modules_to_save": whole or None,
        "inference_mode": True,
    }


def config_hash(config: dict[str, Any]) -> str:
    """The `adapter` part of a fingerprint."""
    return hashlib.sha256(canonical_json(config)).hexdigest()


def lora_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A, B and the magnitudes of every wrapped layer, and all weights of modules that are trained whole, by their names
    in a PEFT file."""
    tensors = {
        f"{_PREFIX}{name}.{part}{suffix}": getattr(module, part)
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear)
        for part, suffix in _PARTS.items()
        if getattr(module, part) is not None
    }
    for name in _trained_whole(model):
        own = model.get_submodule(name).named_parameters()
        tensors |= {f"{_PREFIX}{name}.{parameter}": tensor for parameter, tensor in own}
    return tensors


def _trained_whole(model: PreTrainedModel) -> list[str]:
    """The outermost modules without a frozen weight and without an adapter."""
    found: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in found) or isinstance(module, LoraLinear):
            continue
        weights = list(module.parameters())
        if weights and all(weight.requires_grad for weight in weights):
            found.append(name)
    return found


def save_adapter(model: PreTrainedModel, spec: LoraSpec, base_id: str, folder: Path) -> None:
    """Write the adapter in PEFT layout."""
    config = adapter_config(model, spec, base_id)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in lora_tensors(model).items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def _shape(tensors: dict[str, torch.Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Read an adapter's weights into an injected model; Failure if they do not fit it."""
    stored, own = load_file(folder / WEIGHTS_FILE), lora_tensors(model)
    different = [name for name in sorted(stored.keys() | own.keys()) if _shape(stored, name) != _shape(own, name)]
    if different:
        text = f"The adapter to start from does not fit the settings of this one: they differ in {different[:3]}."
        raise Failure("start_model_mismatch", text, "adapter")
    for name, tensor in own.items():
        tensor.data.copy_(stored[name])
