"""Fully sharded data parallelism: each worker keeps its share of every weight, and gathers a layer while it needs it.

Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", as torch's `fully_shard` does it.
Batches, losses and checkpoints are those of data parallelism, so a run may go on in either way; only the order in which
gradients are added differs. Sharded weights come together in every pass of every worker, so all of them make the same
number of passes, and one that runs out of memory cannot end the run alone: it crashes, and the others with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from training.failure import is_out_of_memory
from training.optim import MOMENTS, Trainer, adamw

if TYPE_CHECKING:
    from training.batches import MicroBatch
    from training.parallel import Workers
    from training.spec import Hyperparameters


def make_trainer(
    model: nn.Module, hyper: Hyperparameters, num_sums: int, compute_dtype: torch.dtype | None, workers: Workers
) -> Trainer | ShardedTrainer:
    """The trainer of a model whose weights it spreads over the workers: all of them are trained, in fp32, and computed
    with in `compute_dtype`; or, without one, only an adapter, which stays whole on each worker."""
    mesh = shard(model, workers, compute_dtype)
    return Trainer(model, hyper, num_sums) if compute_dtype is None else ShardedTrainer(model, hyper, num_sums, mesh)


def shard(model: nn.Module, workers: Workers, compute_dtype: torch.dtype | None) -> DeviceMesh:
    """Spread the weights over the workers, layer by layer; adapters, which are small, stay whole on each of them.

    `compute_dtype` is what trained fp32 weights are gathered in. The model may lie on the CPU: of each layer only this
    worker's share goes to its device.
    """
    mesh = init_device_mesh(workers.device.type, (workers.size,))
    whole = set() if compute_dtype is not None else {p for p in model.parameters() if p.requires_grad}
    for param in whole:
        param.data = param.data.to(workers.device)
    options: dict[str, Any] = {"mesh": mesh, "ignored_params": whole}
    if compute_dtype is not None and compute_dtype != torch.float32:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    layer_names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in layer_names]
    for module in (*layers, model):
        fully_shard(module, **options)
        sharded = cast(FSDPModule, module)
        sharded.set_gradient_divide_factor(1.0)  # sums, as everywhere else: the loop divides by what was counted
        sharded.set_force_sum_reduction_for_comms(True)  # Gloo knows no other
    return mesh


def can_be_told(error: BaseException, model: nn.Module) -> bool:
    """Whether an error is a lack of memory that this worker may tell the others of at their next sum. In the middle of
    a pass over sharded weights they wait for it, so there it cannot."""
    return is_out_of_memory(error) and not isinstance(model, FSDPModule)


def with_idle_passes(mine: list[MicroBatch], spare: MicroBatch, workers: Workers) -> Iterator[tuple[MicroBatch, bool]]:
    """This worker's micro-batches, and as many passes over a spare one as others have more; whether each counts."""
    most = torch.tensor(len(mine), device=workers.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    yield from ((batch, True) for batch in mine)
    yield from ((spare, False) for _ in range(int(most) - len(mine)))


class ShardedTrainer:
    """`optim.Trainer` over sharded fp32 weights: the optimizer sees this worker's shares as plain tensors."""

    def __init__(self, model: nn.Module, hyper: Hyperparameters, num_sums: int, mesh: DeviceMesh) -> None:
        """Takes a model that `shard` has spread, all of whose weights are trained."""
        self.params: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.masters: dict[str, torch.Tensor] = {}  # whole weights on the CPU, on rank 0, since the last `state`
        self._model, self._mesh = cast(FSDPModule, model), mesh
        self._shares = {name: _dtensor(param).to_local().detach() for name, param in self.params.items()}
        device = next(iter(self._shares.values())).device
        self._totals = torch.zeros(num_sums + 1, device=device)  # the last one is the square of the gradients' norm
        self.sums = self._totals[:num_sums]
        self._optimizer = adamw({name: (self._shares[name], p.ndim) for name, p in self.params.items()}, hyper)

    def zero(self) -> None:
        """Forget gradients and sums."""
        for param in self.params.values():
            param.grad = None
        self._totals.zero_()

    def reduce(self, workers: Workers) -> None:
        """Gradients were summed while they came; the rest is summed now."""
        for name, share in self._shares.items():
            grad = self.params[name].grad
            share.grad = torch.zeros_like(share) if grad is None else cast(DTensor, grad).to_local()
            self._totals[-1] += share.grad.square().sum()
        workers.sum_(self._totals)

    def grad_norm(self) -> torch.Tensor:
        """Norm of the summed gradients, on the device."""
        return self._totals[-1].sqrt()

    def step(self, rate: float, grad_scale: float) -> None:
        """One AdamW update with gradients times `grad_scale`."""
        for share in self._shares.values():
            cast(torch.Tensor, share.grad).mul_(grad_scale)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()

    def state(self) -> dict[str, torch.Tensor]:
        """What `Trainer.state` gives, whole, on rank 0; empty on the others, which must call it as well."""
        self._model.reshard()  # as an export on rank 0 would do by itself, which would leave the workers out of step
        tensors = {f"master.{name}": self._whole(share, name) for name, share in self._shares.items()}
        for name, share in self._shares.items():
            state = self._optimizer.state.get(share, {})
            tensors |= {f"{part}.{name}": self._whole(state[part], name) for part in MOMENTS if part in state}
            if "step" in state:
                tensors[f"step.{name}"] = state["step"]
        if self._mesh.get_rank() != 0:
            return {}
        self.masters = {name: tensors[f"master.{name}"] for name in self.params}
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take this worker's share of what `state` gave, here or in a run that was not sharded."""
        for name, share in self._shares.items():
            share.copy_(self._share(tensors[f"master.{name}"]))
            parts = {part: self._share(tensors[f"{part}.{name}"]) for part in MOMENTS if f"{part}.{name}" in tensors}
            if parts:
                step = tensors[f"step.{name}"].to(share.device)
                self._optimizer.state[share] = {**parts, "step": step}

    def _whole(self, share: torch.Tensor, name: str) -> torch.Tensor:
        """All workers' shares of a weight, or of one of its moments, together; empty but on rank 0."""
        like = self.params[name]
        spread = DTensor.from_local(share, self._mesh, [Shard(0)], shape=like.shape, stride=like.stride())
        whole = spread.full_tensor()
        return whole.cpu() if self._mesh.get_rank() == 0 else whole.new_empty(0)

    def _share(self, whole: torch.Tensor) -> torch.Tensor:
        spread = distribute_tensor(whole.to(self._totals.device), self._mesh, [Shard(0)], src_data_rank=None)
        return spread.to_local()


def _dtensor(param: nn.Parameter) -> DTensor:
    assert isinstance(param, DTensor), "a weight that is not sharded"
    return param
