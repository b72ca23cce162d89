"""Sweeps: what to search, and what becomes of one combination of parameters. Pure: no SQL, no Ray, no clock.

A sweep is a job of kind `sweep`. Each combination is a trial: an ordinary fine-tuning job with `parent_job_id` and
`trial_number`, planned, queued, run, paused and cancelled like any other; only its model is not published by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from service.jobs.correction import hyperparameters_of
from service.jobs.states import JobState
from service.store.tables import Job
from training.spec import PositiveFloat, TrainSpec

MAX_TRIALS = 64

BatchSize = Annotated[int, Field(ge=1, le=256)]
NumEpochs = Annotated[int, Field(ge=1, le=50)]
LoraRank = Annotated[int, Field(ge=1, le=512)]
Number = TypeVar("Number")


class _Settings(BaseModel):
    """Immutable, without unknown fields and without guessing between JSON types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Range(_Settings, Generic[Number]):
    """Numbers from `min` to `max`, both included, drawn uniformly; with `log`, their logarithms are."""

    min: Number
    max: Number
    log: bool = False

    @model_validator(mode="after")
    def _not_empty(self) -> Range[Number]:
        if self.min >= self.max:  # type: ignore[operator]
            raise ValueError("'min' must be less than 'max'")
        return self


def _distinct(values: list[Number]) -> list[Number]:
    if len(set(values)) < len(values):
        raise ValueError("its values must differ")
    return values


Values = Annotated[list[Number], Field(min_length=1, max_length=MAX_TRIALS), AfterValidator(_distinct)]


class Parameters(_Settings):
    """What is varied: each by a list of values or by a range."""

    learning_rate: Values[PositiveFloat] | Range[PositiveFloat] | None = None
    batch_size: Values[BatchSize] | Range[BatchSize] | None = None
    n_epochs: Values[NumEpochs] | Range[NumEpochs] | None = None
    lora_rank: Values[LoraRank] | Range[LoraRank] | None = None

    @model_validator(mode="after")
    def _at_least_one(self) -> Parameters:
        if not self.given():
            raise ValueError(f"vary at least one of {', '.join(Parameters.model_fields)}")
        return self

    def given(self) -> dict[str, list[Any] | Range[Any]]:
        """Those that are varied, by name."""
        return {name: value for name, value in self if value is not None}


class Sweep(_Settings):
    """A search for the parameters with the lowest validation loss."""

    search: Literal["grid", "random"] = "grid"
    scheduler: Literal["asha"] | None = None  # stops weak trials early
    num_trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)] | None = (
        None  # of a random search; a grid has its own number
    )
    max_concurrent: Annotated[int, Field(ge=1, le=MAX_TRIALS)] = 2  # trials that wait or work at a time
    parameters: Parameters
    metric: Literal["valid_loss"] = "valid_loss"

    def num_combinations(self) -> int | None:
        """How many there are; None with a range of fractions, which has any number."""
        product = 1
        for values in self.parameters.given().values():
            if not isinstance(values, Range):
                product *= len(values)
            elif isinstance(values.min, int):
                product *= values.max - values.min + 1
            else:
                return None
        return product


class Trial(_Settings):
    """One combination, and how it does so far."""

    parameters: dict[str, float | int]
    valid_loss: float | None = None  # the lowest so far, which is that of the trial's model
    step: int | None = None  # where it was lowest
    stopped_early_at_step: int | None = None


def spec_of_trial(spec: TrainSpec, parameters: dict[str, float | int]) -> TrainSpec:
    """The sweep's spec with the trial's parameters; what the sweep leaves on auto is resolved for each trial."""
    changes = dict(parameters)
    rank = changes.pop("lora_rank", None)
    adapter = spec.adapter
    if rank is not None:
        assert adapter is not None, "a sweep over lora_rank of a job without LoRA"
        adapter = adapter.model_copy(update={"rank": rank})
    hyperparameters = spec.hyperparameters.model_copy(update=changes)
    changed = spec.model_copy(update={"adapter": adapter, "hyperparameters": hyperparameters})
    return TrainSpec.model_validate(changed.model_dump())


def request_of_trial(sweep: Job, parameters: dict[str, float | int]) -> dict[str, Any]:
    """The body of a create that would train what the trial does, with the trackers that the sweep asked for."""
    changes = dict(parameters)
    request = {n: copy.deepcopy(v) for n, v in sweep.request.items() if n != "sweep" and not n.startswith("_")}
    rank = changes.pop("lora_rank", None)
    if rank is not None:
        request["adapter"] = {**(request.get("adapter") or {}), "rank": rank}
    if changes:
        hyperparameters_of(request, sweep.method).update(changes)
    return request


def field_to_change(sweep: Sweep, param: str | None) -> str | None:
    """What the sweep's owner calls the field that planning a trial complains of."""
    name = {"rank": "lora_rank"}.get(last := (param or "").rpartition(".")[2], last)
    return f"sweep.parameters.{name}" if name in sweep.parameters.given() else param


def describe(parameters: dict[str, float | int]) -> str:
    """For event lists: learning_rate 0.0003, batch_size 8."""
    return ", ".join(f"{name} {value:g}" for name, value in parameters.items())


def find_best(trials: Iterable[Job]) -> Job | None:
    """The finished trial with the lowest validation loss; of equals the first."""
    finished = [job for job in trials if job.state == JobState.SUCCEEDED and result_of(job).valid_loss is not None]
    return min(finished, key=lambda job: (result_of(job).valid_loss, job.trial_number), default=None)


def result_of(trial: Job) -> Trial:
    """The trial's combination and how it does, as stored with its job."""
    return Trial.model_validate(trial.trial)
