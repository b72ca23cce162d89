"""What to train: the one declaration of every hyperparameter, used by HTTP, CLI, tests and workers.

A spec may leave hyperparameters on "auto"; `training.plan.resolve` returns the same spec with numbers in their place,
and only a resolved spec can be run. Its JSON is stored with the job and inside the artifact.
Imports the standard library and pydantic only, so that the API can validate a job without torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, model_validator

AUTO: Literal["auto"] = "auto"
Auto = Literal["auto"]

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class Contract(BaseModel):
    """Base of every contract type: immutable, and unknown fields are refused rather than dropped."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class BaseRef(Contract):
    """The base model that a run starts from: a folder in storage, named by its key and proved by its content hash."""

    id: str
    key: str
    content_hash: str


class StartRef(Contract):
    """An earlier fine-tune of the same base to go on from: an adapter's folder, or with `adapter=None` full weights."""

    model_id: str
    key: str
    manifest_hash: str


class LoraSpec(Contract):
    """Low-rank adaptation (Hu et al. 2021): W + alpha / rank * B @ A on each target linear layer."""

    rank: Annotated[int, Field(ge=1, le=512)] | Auto = AUTO
    alpha: PositiveFloat | Auto = AUTO
    rslora: bool = False  # alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023): larger ranks learn as fast
    dora: bool = False  # a trained length for each row of the sum (Liu et al. 2024), which keeps its direction apart
    dropout: Fraction = 0.0
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"


class Hyperparameters(Contract):
    """Optimisation settings. `learning_rate` is absolute; when given, `learning_rate_multiplier` must stay on auto."""

    n_epochs: Annotated[int, Field(ge=1, le=50)] | Auto = AUTO
    batch_size: Annotated[int, Field(ge=1, le=256)] | Auto = AUTO  # examples per optimizer step, over all workers
    learning_rate_multiplier: PositiveFloat | Auto = AUTO
    learning_rate: PositiveFloat | Auto = AUTO
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: Fraction = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    adam_beta1: Fraction = 0.9
    adam_beta2: Fraction = 0.999
    max_grad_norm: PositiveFloat = 1.0
    gradient_accumulation_steps: PositiveInt | Auto = AUTO  # micro-batches per optimizer step
    max_length: PositiveInt | Auto = AUTO  # tokens per example; plain text is cut, anything else refused


class EarlyStopping(Contract):
    """Train no further once the validation loss has not improved by `min_delta` for `patience` evaluations."""

    patience: PositiveInt
    min_delta: Annotated[float, Field(ge=0)] = 0.0


def _only_simpo_has_a_margin(gamma: float | Auto, info: ValidationInfo) -> float | Auto:
    if gamma not in (AUTO, 0) and info.data.get("loss_type") not in ("simpo", None):
        raise ValueError("only the loss_type 'simpo' has a margin")
    return gamma


class DpoSpec(Contract):
    """Settings of the method `dpo`; the losses are explained in `training.methods.dpo`."""

    beta: Annotated[float, Field(gt=0, le=2, allow_inf_nan=False)] | Auto = AUTO
    loss_type: Literal["sigmoid", "ipo", "simpo", "orpo"] = "sigmoid"
    gamma: Annotated[
        Annotated[float, Field(ge=0, allow_inf_nan=False)] | Auto, AfterValidator(_only_simpo_has_a_margin)
    ] = AUTO  # by how much simpo wants the better answer's reward to be larger


SamplePrompts = Annotated[tuple[Annotated[str, Field(min_length=1, max_length=2000)], ...], Field(max_length=8)]


class ClassificationSettings(Contract):
    """What can be chosen for the method `classification`; explained in `training.methods.classification`."""

    class_weights: Literal["none", "sqrt", "balanced"] = "sqrt"
    label_smoothing: Fraction | Auto = AUTO


class ClassificationSpec(ClassificationSettings):
    """Settings of the method `classification`: what can be chosen, and what planning finds in the training file."""

    labels: tuple[str, ...] | Auto = AUTO  # in the order of their numbers
    label_counts: tuple[int, ...] | Auto = AUTO  # training examples of each label


class EmbeddingSpec(Contract):
    """Settings of the method `embedding`; the loss is explained in `training.methods.embedding`."""

    temperature: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | Auto = AUTO


class TrainSpec(Contract):
    """One fine-tuning run. `adapter=None` trains all weights."""

    base: BaseRef
    start: StartRef | None = None  # the weights to start from, if not the base's own; an adapter must fit `adapter`
    method: Literal["supervised", "dpo", "classification", "embedding"] = "supervised"
    dpo: DpoSpec | None = None  # given with the method dpo, and only with it
    classification: ClassificationSpec | None = None  # given with the method classification, and only with it
    embedding: EmbeddingSpec | None = None  # given with the method embedding, and only with it
    training_key: str  # storage key of the JSONL training file
    validation_key: str | None = None
    validation_split: Annotated[float, Field(ge=0, le=0.5)] = 0.0  # share held out when no validation file is given
    adapter: LoraSpec | None = LoraSpec()
    hyperparameters: Hyperparameters = Hyperparameters()
    precision: Literal["fp32", "bf16"] | Auto = AUTO
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    num_workers: PositiveInt = 1  # with `min_workers`: the most
    min_workers: PositiveInt | None = None  # an elastic range: a run may have fewer workers, down to this many
    parallel: Literal["data", "fsdp"] = "data"  # a whole model on each worker, or its weights spread over them
    eval_interval: PositiveInt | Auto = AUTO  # optimizer steps between evaluations
    n_evals: PositiveInt | None = None  # evaluations of the whole run, from which a plan finds the interval
    checkpoint_interval: PositiveInt | Auto = AUTO  # optimizer steps between checkpoints
    keep_checkpoints: PositiveInt = 3  # the last k stay, and always the best; others are deleted
    sample_prompts: SamplePrompts = ()  # answered after each evaluation interval, to be looked at
    early_stopping: EarlyStopping | None = None  # needs a validation file or split

    def validates(self) -> bool:
        """Whether examples are asked to be held out or given for validation."""
        return self.validation_key is not None or self.validation_split > 0

    def least_workers(self) -> int:
        """The fewest workers that a run may have; without a range, all of them."""
        return self.num_workers if self.min_workers is None else self.min_workers

    def labels(self) -> tuple[str, ...]:
        """The labels of a resolved classification; none with other methods."""
        if self.classification is None:
            return ()
        assert self.classification.labels != AUTO, "labels are known once the job is planned"
        return self.classification.labels

    def unresolved(self) -> list[str]:
        """Names of the fields still on auto, dotted; empty when the spec can be run."""
        names = [name for name in ("precision", "eval_interval", "checkpoint_interval") if getattr(self, name) == AUTO]
        names += [f"hyperparameters.{name}" for name, value in self.hyperparameters if value == AUTO]
        for part in ("adapter", "dpo", "classification", "embedding"):
            names += [f"{part}.{name}" for name, value in getattr(self, part) or () if value == AUTO]
        return names

    def trains_like(self, other: TrainSpec) -> bool:
        """Whether a run of this may go on from the other's checkpoints: all is equal but how workers share it."""
        how = {name: getattr(other, name) for name in ("num_workers", "min_workers", "parallel")}
        return self.model_copy(update=how) == other

    @model_validator(mode="after")
    def _range_of_workers(self) -> TrainSpec:
        if self.least_workers() > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} is more than num_workers {self.num_workers}")
        return self

    @model_validator(mode="after")
    def _settings_of_the_method(self) -> TrainSpec:
        for name in ("dpo", "classification", "embedding"):
            if (getattr(self, name) is not None) != (self.method == name):
                raise ValueError(f"'{name}' holds the settings of the method '{name}': give both or neither")
        return self
