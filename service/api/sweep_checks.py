"""What a sweep may ask of a job: checked at its creation, each refusal naming the field to change."""

from __future__ import annotations

from service.api.schemas import CreateJob
from service.errors import InvalidRequest
from service.jobs.sweeps import MAX_TRIALS, Range, Sweep
from training.spec import AUTO, Hyperparameters, LoraSpec


def check_sweep(body: CreateJob, sweep: Sweep, chosen: Hyperparameters) -> None:
    """InvalidRequest for a sweep that could not compare its trials, or that contradicts itself or the job."""
    if body.validation_file is None and not body.validation_split:
        raise InvalidRequest(
            "A sweep compares its trials by their validation loss; give a 'validation_file' or a 'validation_split'.",
            param="validation_file",
            code="missing_required_parameter",
        )
    if body.method_type == "embedding" and sweep.parameters.batch_size is not None:
        message = (
            "'batch_size' cannot be varied with the method 'embedding': the validation loss is over the negatives of a "
            "batch, so that smaller ones would always win."
        )
        raise InvalidRequest(message, param="sweep.parameters.batch_size")
    _check_number(sweep)
    _check_not_given_twice(body, sweep, chosen)


def check_rank_is_free(sweep: Sweep, adapter: LoraSpec | None, *, continues: bool) -> None:
    """InvalidRequest for a sweep over the rank of an adapter that the job's start does not leave open."""
    if sweep.parameters.lora_rank is None or (adapter is not None and not continues):
        return
    why = (
        "trains all weights here; ask for an adapter by 'adapter.type' 'lora'"
        if adapter is None
        else "keeps the rank of the adapter that it starts from"
    )
    raise InvalidRequest(f"'lora_rank' cannot be varied: the job {why}.", param="sweep.parameters.lora_rank")


def _check_number(sweep: Sweep) -> None:
    num = sweep.num_combinations()
    if sweep.search == "random":
        if sweep.num_trials is None:
            message = "A random search needs 'sweep.num_trials': how many combinations to draw."
            raise InvalidRequest(message, param="sweep.num_trials", code="missing_required_parameter")
        if num is not None and sweep.num_trials > num:
            message = (
                f"Invalid value for 'sweep.num_trials': there are only {num} combinations; search 'grid' tries all."
            )
            raise InvalidRequest(message, param="sweep.num_trials")
        return
    if sweep.num_trials is not None:
        message = "'sweep.num_trials' belongs to the search 'random'; a grid tries every combination once."
        raise InvalidRequest(message, param="sweep.num_trials")
    for name, values in sweep.parameters.given().items():
        if isinstance(values, Range):
            message = (
                f"Invalid value for 'sweep.parameters.{name}': a grid needs a list; ranges need the search 'random'."
            )
            raise InvalidRequest(message, param=f"sweep.parameters.{name}")
    if num is not None and num > MAX_TRIALS:
        message = (
            f"The grid has {num} combinations, and a sweep at most {MAX_TRIALS}; shorten a list, or draw at random."
        )
        raise InvalidRequest(message, param="sweep.parameters")


def _check_not_given_twice(body: CreateJob, sweep: Sweep, chosen: Hyperparameters) -> None:
    given = sweep.parameters.given()
    for name in given.keys() & chosen.model_dump().keys():
        if getattr(chosen, name) != AUTO:
            message = f"'{name}' is both fixed and varied; leave it out of the hyperparameters, or out of the sweep."
            raise InvalidRequest(message, param=f"sweep.parameters.{name}")
    if "learning_rate" in given and chosen.learning_rate_multiplier != AUTO:
        message = "'learning_rate_multiplier' has no effect where a sweep varies 'learning_rate'; leave it out."
        raise InvalidRequest(message, param=f"method.{body.method_type}.hyperparameters.learning_rate_multiplier")
    if "lora_rank" not in given:
        return
    if body.adapter.type == "none":
        message = "'lora_rank' varies a LoRA adapter, and the adapter's type is 'none'."
        raise InvalidRequest(message, param="sweep.parameters.lora_rank")
    if body.adapter.rank != AUTO:
        message = "'adapter.rank' is fixed and 'lora_rank' varied; leave one of them out."
        raise InvalidRequest(message, param="sweep.parameters.lora_rank")
