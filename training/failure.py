"""The failures that a run reports instead of raising: a retry would not mend them."""

from __future__ import annotations

# What torch's plain RuntimeErrors say when memory is short: on a CPU, from CUDA itself, from its libraries, from C++.
_SIGNS = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)


class Failure(Exception):
    """Ends a run with a code and a sentence for the job's owner; `param` names the spec's field to change, if any."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param

    def field_of(self, method: str) -> str | None:
        """The field as a request to the service names it."""
        is_hyperparameter = self.param is not None and self.param.startswith("hyperparameters.")
        return f"method.{method}.{self.param}" if is_hyperparameter else self.param


def out_of_memory() -> Failure:
    """The failure of a run whose model and batch do not fit."""
    return Failure(
        "out_of_memory",
        "A training worker ran out of memory. Use a smaller batch_size, more gradient_accumulation_steps, "
        "a smaller max_length, bf16 precision, or LoRA instead of full fine-tuning.",
        "hyperparameters.batch_size",
    )


def not_finite(step: int, what: str, kept: list[int]) -> Failure:
    """The failure of a run whose numbers have become infinite or none at all; `kept` are its checkpoints."""
    where = f"The checkpoint of step {kept[-1]} is kept. " if kept else ""
    return Failure(
        "loss_not_finite",
        f"Training stopped at step {step}: {what}. {where}Use a lower learning_rate or a longer warm-up, and check the "
        "files for unusual rows.",
        "hyperparameters.learning_rate",
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is short. Often torch raises a plain RuntimeError for it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and says_out_of_memory(str(error))


def says_out_of_memory(text: str) -> bool:
    """Whether the words of a torch error, also as part of a longer report, say that memory is short."""
    return any(sign in text for sign in _SIGNS)


def check_flag(num_workers_out_of_memory: float) -> None:
    """Failure on every worker when one of them ran out of memory; the count was summed over the workers."""
    if num_workers_out_of_memory:
        raise out_of_memory()
