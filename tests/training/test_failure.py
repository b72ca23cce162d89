"""A lack of memory is told by its code, whoever finds it first and wherever it comes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.runs import Recorder, make_base, make_spec
from training.failure import is_out_of_memory
from training.loop import run
from training.optim import MOMENTS, adamw
from training.progress import Failed
from training.spec import Hyperparameters
from training.storage import Storage


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA to enable device-side assertions."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("std::bad_alloc"),
    ],
    ids=str,
)
def test_every_library_has_its_own_words_for_it(error: BaseException) -> None:
    assert is_out_of_memory(error)


def test_torch_says_so_itself_and_other_errors_are_crashes() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(ValueError("std::bad_alloc"))


def test_an_optimizer_has_its_moments_before_the_first_step() -> None:
    """Made there, they would be missed in the middle of an update, of which no worker tells the others."""
    weight = torch.zeros(3, 2, requires_grad=True)
    (state,) = adamw({"weight": (weight, 2)}, Hyperparameters(learning_rate=0.1)).state.values()
    assert all(state[part].shape == weight.shape for part in MOMENTS)


class CrampedFolder(Storage):
    """A storage that has no memory left for what is written to it."""

    def put_folder(self, local: Path, key: str) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")


def test_a_lack_of_memory_outside_of_the_passes_is_coded_too(tmp_path: Path) -> None:
    storage, channel = CrampedFolder(str(tmp_path / "storage")), Recorder()
    outcome = run(make_spec(storage, make_base(storage)), storage, "runs/one", channel, tmp_path / "scratch")
    assert (outcome.status, outcome.code, outcome.step) == ("failed", "out_of_memory", 5)
    assert channel.of(Failed)[0].param == "method.supervised.hyperparameters.batch_size"
