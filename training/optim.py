"""Weights being trained, their gradients in one flat buffer, AdamW over fp32 masters, learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import nn

from training.spec import Hyperparameters

if TYPE_CHECKING:
    from training.parallel import Workers

MOMENTS = ("exp_avg", "exp_avg_sq")
_STATE = (*MOMENTS, "step")
_PIECE = 1 << 20  # numbers


def learning_rate(hyper: Hyperparameters, step: int, total_steps: int) -> float:
    """Rate of a step (1-based). Warm-up ends at the full rate; decay never reaches zero before the last step."""
    peak = cast(float, hyper.learning_rate)
    num_warmup = math.ceil(hyper.warmup_ratio * total_steps)
    if step <= num_warmup:
        return peak * step / num_warmup
    progress = (step - 1 - num_warmup) / (total_steps - num_warmup)
    return peak * _DECAYS[hyper.lr_scheduler](progress)


_DECAYS: dict[Literal["linear", "cosine", "constant"], Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "constant": lambda progress: 1.0,
}


def adamw(weights: dict[str, tuple[torch.Tensor, int]], hyper: Hyperparameters) -> torch.optim.AdamW:
    """AdamW over tensors, each given with the dimensions of the weight that it is, or is a part of.

    Weight decay acts on matrices; norms and biases, which are vectors, are spared. The moments are made at once, so
    that a lack of memory shows before the first step, where the workers can still tell one another."""
    matrices = [tensor for tensor, ndim in weights.values() if ndim >= 2]
    vectors = [tensor for tensor, ndim in weights.values() if ndim < 2]
    groups = [{"params": matrices, "weight_decay": hyper.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    betas = (hyper.adam_beta1, hyper.adam_beta2)
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=betas, fused=True)
    for tensor, _ in weights.values():
        moments = {part: torch.zeros_like(tensor, memory_format=torch.preserve_format) for part in MOMENTS}
        optimizer.state[tensor] = {"step": torch.zeros((), device=tensor.device), **moments}
    return optimizer


class Trainer:
    """Everything that an optimizer step changes.

    Parameters in bf16 have an fp32 master that the optimizer updates, and are cast from it once per step. Gradients of
    all masters are views of `flat`, whose last slots carry the step's sums: one all-reduce moves the whole step.
    """

    def __init__(
        self, model: nn.Module, hyper: Hyperparameters, num_sums: int, compute_dtype: torch.dtype | None = None
    ) -> None:
        """Takes the model with its trained weights in fp32; `compute_dtype` is what they are cast to for computing."""
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        masters = {name: p.detach() for name, p in named}
        if compute_dtype is not None:
            for _, param in named:  # not model.to(): buffers such as rotary frequencies must stay exact
                param.data = param.data.to(compute_dtype)
        self.params = dict(named)
        self.masters = {name: p if p.dtype == torch.float32 else masters[name] for name, p in named}
        num_weights = sum(p.numel() for p in self.params.values())
        self.flat = torch.zeros(num_weights + num_sums, device=named[0][1].device)
        self.grads, self.sums = self.flat[:num_weights], self.flat[num_weights:]
        views = self.grads.split([p.numel() for p in self.params.values()])
        for (name, param), view in zip(named, views, strict=True):
            master = self.masters[name]
            master.grad = view.view_as(master)
            if master is not param:
                param.register_post_accumulate_grad_hook(_move_gradient_to(master.grad))
        self._optimizer = adamw({name: (master, master.ndim) for name, master in self.masters.items()}, hyper)

    def zero(self) -> None:
        """Forget gradients and sums."""
        self.flat.zero_()

    def reduce(self, workers: Workers) -> None:
        """Sum gradients and sums over the workers."""
        workers.sum_(self.flat)

    def grad_norm(self) -> torch.Tensor:
        """Norm of the summed gradients, on the device."""
        return torch.linalg.vector_norm(self.grads)

    def step(self, rate: float, grad_scale: float) -> None:
        """One AdamW update with gradients times `grad_scale`."""
        self.grads.mul_(grad_scale)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._cast_masters()

    @torch.no_grad()
    def _cast_masters(self) -> None:
        for name, param in self.params.items():
            if self.masters[name] is not param:
                param.copy_(self.masters[name])

    def state(self) -> dict[str, torch.Tensor]:
        """Masters and optimizer state by name: what a resumed run needs to go on to the bit."""
        tensors = {f"master.{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            state = self._optimizer.state.get(master, {})
            tensors |= {f"{part}.{name}": state[part] for part in _STATE if part in state}
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take back what `state` gave."""
        for name, master in self.masters.items():
            master.copy_(tensors[f"master.{name}"])
            parts = {part: tensors[f"{part}.{name}"] for part in _STATE if f"{part}.{name}" in tensors}
            if parts:
                self._optimizer.state[master] = {part: tensor.to(master.device) for part, tensor in parts.items()}
        self._cast_masters()


def _move_gradient_to(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """A hook that adds a fresh bf16 gradient to the fp32 total and frees it.

    On a CPU torch makes an fp32 copy of what it adds: piece by piece that copy stays in the cache."""

    def hook(param: torch.Tensor) -> None:
        grad = cast(torch.Tensor, param.grad)
        size = _PIECE if grad.device.type == "cpu" else grad.numel()
        for part, more in zip(total.view(-1).split(size), grad.reshape(-1).split(size), strict=True):
            part.add_(more)
        param.grad = None

    return hook
