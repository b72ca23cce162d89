"""The failures that a run reports instead of raising: a retry would not mend them."""

from __future__ import annotations


class Failure(Exception):
    """Ends a run with a code and a sentence for the job's owner; `param` names the field to change, if there is one."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


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
    """Whether an error says that memory is short. On a CPU torch raises a plain RuntimeError for it."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text)


def check_flag(num_workers_out_of_memory: float) -> None:
    """Failure on every worker when one of them ran out of memory; the count was summed over the workers."""
    if num_workers_out_of_memory:
        raise out_of_memory()
