"""Linear layers as the engine runs them: those that read the same input as one product, with their adapters.

On a CPU the weights of bf16 are laid out in advance, as our own kernel wants them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from service.engine.native.cpu_kernels import kernels_for, panels_of, weight_of
from service.engine.native.lora import AdapterStack, GroupFactors


class FusedLinear(nn.Module):
    """Stands in for one or more `nn.Linear` or `Conv1D` with the same input; their outputs lie side by side."""

    def __init__(self, layers: Sequence[nn.Linear | Conv1D], names: Sequence[str], stack: AdapterStack) -> None:
        super().__init__()
        rows: list[torch.Tensor] = [layer.weight.T if isinstance(layer, Conv1D) else layer.weight for layer in layers]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        assert len(biases) in (0, len(layers)), "layers that share an input have all a bias or none"
        self.bias = torch.cat([bias.detach() for bias in biases]) if biases else None
        weight = rows[0] if len(rows) == 1 else torch.cat(rows)
        kernels = kernels_for(weight)
        self.kernels = kernels if kernels is not None and kernels.can_multiply(weight.shape[1]) else None
        self.laid_out = panels_of(weight.detach()) if self.kernels else weight.detach()
        out_features = tuple(len(part) for part in rows)
        self._num_outputs = sum(out_features)
        self.factors = GroupFactors(tuple(names), weight.shape[1], out_features, self.bias, stack)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., out of all] of [..., in]; tokens are counted over all leading dimensions."""
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        if self.kernels is not None:
            y = self.kernels.linear(flat, self.laid_out, self._num_outputs, self.bias)
        else:
            y = F.linear(flat, self.laid_out, self.bias)
        if self.factors.is_adapted:
            self.factors.adapt(flat, y)
        return y.view(*x.shape[:-1], -1)

    def added_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """residual + forward(x), both of two dimensions."""
        if self.factors.is_scaled:
            return residual + self(x)
        y: torch.Tensor
        if self.kernels is not None:
            y = self.kernels.linear(x.contiguous(), self.laid_out, self._num_outputs, self.bias, residual)
        elif self.bias is None:
            y = torch.addmm(residual, x, self.laid_out.t())
        else:
            y = residual + F.linear(x, self.laid_out, self.bias)
        if self.factors.is_adapted:
            self.factors.adapt(x, y)
        return y

    @property
    def weight(self) -> torch.Tensor:
        """[out of all, in]."""
        return self.laid_out if self.kernels is None else weight_of(self.laid_out, self._num_outputs)

    def rows(self, member: int) -> torch.Tensor:
        """The weight [out, in] of one of the layers."""
        return self.weight.split(self.factors.out_features)[member]


@dataclass(frozen=True)
class Linear:
    """A linear layer that an adapter may target."""

    fused: FusedLinear
    member: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.fused.factors.out_features[self.member], self.fused.factors.in_features

    @property
    def rows(self) -> torch.Tensor:
        """The weight [out, in]."""
        return self.fused.rows(self.member)

    @property
    def like(self) -> torch.Tensor:
        """An empty tensor of the weight's type, on its device."""
        return torch.empty(0, dtype=self.fused.laid_out.dtype, device=self.fused.laid_out.device)


def fuse_single(model: nn.Module, stack: AdapterStack) -> None:
    """Replace every linear layer of a model that is left, each by itself."""
    for name, module in list(model.named_modules()):
        if type(module) in (nn.Linear, Conv1D):
            _replace(model, name, FusedLinear([module], [name], stack))


def fuse_head(model: PreTrainedModel, stack: AdapterStack) -> None:
    """Replace the head. It needs a stack of its own: of a step's tokens it reads only those whose logits are wanted."""
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    _replace(model, name, FusedLinear([head], [name], stack))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """Every linear layer of a model, by the name that it had when it was loaded."""
    return {
        name: Linear(module, member)
        for module in model.modules()
        if isinstance(module, FusedLinear)
        for member, name in enumerate(module.factors.names)
    }
