"""The workers of one run as one group: rank, size, device, and sums in a fixed order.

Works alone, under torchrun (which this file joins), and under Ray Train (which sets the group up before the loop).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from training.failure import Failure, is_out_of_memory, out_of_memory


@dataclass(frozen=True)
class Workers:
    """This process among the workers of its run."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls) -> Workers:
        """The group that exists, the one torchrun describes, or a group of one."""
        device = torch.device("cpu")
        launched = dist.is_available() and dist.is_torchelastic_launched()
        if torch.cuda.is_available():
            if launched:
                torch.cuda.set_device(dist.get_node_local_rank(0))
            device = torch.device("cuda", torch.cuda.current_device())
        if launched and not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(0, 1, device)

    def sum_(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by its sum over the workers; one flat call, so the order of additions never changes."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def total(self, value: float) -> float:
        """The sum of one number over the workers."""
        total = torch.tensor(value, device=self.device)
        self.sum_(total)
        return total.item()

    def seed(self, seed: int, step: int, number: int) -> None:
        """Random draws (dropout) in this worker's micro-batch `number` depend on seed, step and that micro-batch alone:
        a resumed run repeats them, also with fewer workers that take the same micro-batches."""
        digest = hashlib.sha256(f"{seed} {step} {self.rank + number * self.size}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7], "big"))

    def passes(self, num_examples: int, size: int) -> Iterator[list[int]]:
        """This worker's share of the examples, `size` neighbours at a time whatever the number of workers. There are as
        many passes as the first worker has: sharded weights need all workers in each. Others may end with an empty
        one."""
        for start in range(0, num_examples, size * self.size):
            mine = start + self.rank * size
            yield list(range(num_examples)[mine : mine + size])

    def leave(self) -> None:
        """Wait for the others and dissolve a group that torchrun started."""
        if self.size > 1 and dist.is_torchelastic_launched():
            dist.barrier()
            dist.destroy_process_group()


def agree_on(workers: Workers, work: Callable[[], None]) -> None:
    """Do work that every worker does by itself; when one of them fails, all of them do."""
    failure: Failure | None = None
    try:
        work()
    except Failure as error:
        failure = error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failure = out_of_memory()
    num_failed = workers.total(float(failure is not None))
    if num_failed:
        raise failure or Failure("worker_failed", "Another worker of this run could not start.")


def failure_of(error: Exception, workers: Workers) -> Failure:
    """What a run that was ended by an error reports; raises what is a crash. Memory may also be short outside of the
    passes: in the update, or for a checkpoint. There a worker cannot tell the others, which its crash ends with it."""
    if isinstance(error, Failure):
        return error
    if workers.size == 1 and is_out_of_memory(error):
        return out_of_memory()
    raise error
