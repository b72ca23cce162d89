"""Wire types of the resources: what a request may hold. Unknown fields are refused by name, never dropped."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from service.jobs.sweeps import Sweep
from training.spec import (
    AUTO,
    Auto,
    ClassificationSettings,
    ClassificationSpec,
    DpoSpec,
    EarlyStopping,
    EmbeddingSpec,
    Hyperparameters,
    LoraSpec,
    PositiveFloat,
    PositiveInt,
)

MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512

MethodType = Literal["supervised", "dpo", "classification", "embedding"]

_SUFFIX = re.compile(r"[a-z0-9._-]{1,64}")
_BASE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_ALIAS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
_PROJECT_ID = re.compile(r"proj-[A-Za-z0-9-]{1,59}")


class Wire(BaseModel):
    """Base of request bodies: no unknown fields, no guessing between JSON types."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _storable(text: str) -> str:
    """Neither NUL, which PostgreSQL cannot store, nor half of a surrogate pair, which no answer could ever show."""
    if "\0" in text:
        raise ValueError("it must not contain NUL characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it must not contain half of a surrogate pair, which is no character") from None
    return text


Text = Annotated[str, AfterValidator(_storable)]
ObjectId = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_storable)]


def _check_metadata(pairs: dict[str, str]) -> dict[str, str]:
    if len(pairs) > MAX_METADATA_PAIRS:
        raise ValueError(f"at most {MAX_METADATA_PAIRS} pairs are allowed, {len(pairs)} were given")
    for name, value in pairs.items():
        if not 1 <= len(name) <= MAX_METADATA_KEY:
            raise ValueError(f"keys must have 1 to {MAX_METADATA_KEY} characters, '{name[:80]}' has {len(name)}")
        if len(value) > MAX_METADATA_VALUE:
            raise ValueError(f"values have at most {MAX_METADATA_VALUE} characters, that of '{name}' has {len(value)}")
    return pairs


Metadata = Annotated[dict[Text, Text], AfterValidator(_check_metadata)]


def _safe_suffix(suffix: str) -> str:
    """The suffix as it stands in the model's id: lower case, blanks as dashes."""
    safe = suffix.strip().lower().replace(" ", "-")
    if not _SUFFIX.fullmatch(safe):
        raise ValueError("use 1 to 64 of the characters A-Z, a-z, 0-9, '-', '_', '.' and blank")
    return safe


def _refuse(value: Any, why: str) -> Any:
    if value is not None and value != []:
        raise PydanticCustomError("unsupported_parameter", "{why}", {"why": why})
    return None


def _no_reinforcement(value: Any) -> Any:
    if value == "reinforcement":
        why = (
            "Unsupported parameter: 'method.type' cannot be 'reinforcement' here. Supported are 'supervised', 'dpo', "
            "'classification' and 'embedding'."
        )
        raise PydanticCustomError("unsupported_parameter", "{why}", {"why": why})
    return value


def _no_other_method(value: Any) -> Any:
    return _refuse(value, "Unsupported parameter: 'method' may hold the settings of its own type only.")


def _only_of_its_type(value: Any, info: ValidationInfo) -> Any:
    if info.data.get("type", info.field_name) == info.field_name:
        return value
    return _refuse(value, f"Unsupported parameter: 'method.{info.field_name}' needs 'method.type' '{info.field_name}'.")


class TopHyperparameters(Wire):
    """OpenAI's deprecated top-level form."""

    n_epochs: Annotated[int, Field(ge=1, le=50)] | Auto = AUTO
    batch_size: Annotated[int, Field(ge=1, le=256)] | Auto = AUTO
    learning_rate_multiplier: PositiveFloat | Auto = AUTO


class WireHyperparameters(Hyperparameters):
    """Every hyperparameter of the training contract, with strict JSON types."""

    model_config = ConfigDict(strict=True)


class Supervised(Wire):
    """Settings of the method `supervised`."""

    hyperparameters: WireHyperparameters | None = None


class WireDpoHyperparameters(WireHyperparameters, DpoSpec):
    """The same, and the settings of the method `dpo`."""


class Dpo(Wire):
    """Settings of the method `dpo`."""

    hyperparameters: WireDpoHyperparameters | None = None


class WireClassificationHyperparameters(WireHyperparameters, ClassificationSettings):
    """The same, and what can be chosen for the method `classification`."""


class Classification(Wire):
    """Settings of the method `classification`."""

    hyperparameters: WireClassificationHyperparameters | None = None


class WireEmbeddingHyperparameters(WireHyperparameters, EmbeddingSpec):
    """The same, and the settings of the method `embedding`."""


class Embedding(Wire):
    """Settings of the method `embedding`."""

    hyperparameters: WireEmbeddingHyperparameters | None = None


class Method(Wire):
    """How to fine-tune."""

    type: Annotated[MethodType, BeforeValidator(_no_reinforcement)]
    supervised: Annotated[Supervised | None, BeforeValidator(_only_of_its_type)] = None
    dpo: Annotated[Dpo | None, BeforeValidator(_only_of_its_type)] = None
    classification: Annotated[Classification | None, BeforeValidator(_only_of_its_type)] = None
    embedding: Annotated[Embedding | None, BeforeValidator(_only_of_its_type)] = None
    reinforcement: Annotated[None, BeforeValidator(_no_other_method)] = None


class Adapter(LoraSpec):
    """Which weights to train: a LoRA adapter (default), or with type `none` all of them."""

    model_config = ConfigDict(strict=True)
    type: Literal["lora", "none"] = "lora"
    targets: Literal["all-linear"] | Annotated[tuple[Text, ...], Field(strict=False, min_length=1, max_length=64)] = (
        "all-linear"
    )

    @model_validator(mode="after")
    def _no_settings_without_lora(self) -> Adapter:
        extra = sorted(self.model_fields_set - {"type"})
        if self.type == "none" and extra:
            raise ValueError(f"type 'none' trains all weights and takes no {', '.join(extra)}")
        return self

    def to_spec(self) -> LoraSpec | None:
        """What the training contract calls it."""
        if self.type == "none":
            return None
        return LoraSpec.model_validate(self.model_dump(exclude={"type"}))


class WireEarlyStopping(EarlyStopping):
    """When to train no further, with strict JSON types."""

    model_config = ConfigDict(strict=True)


def _wandb_project(name: str) -> str:
    """What W&B itself would refuse, when the run has begun already."""
    if set(name) & set("/\\#?%:"):
        raise ValueError("it must not contain any of / \\ # ? % :")
    return name


class Wandb(Wire):
    """Where in Weights & Biases the job's numbers go."""

    project: Annotated[Text, Field(min_length=1, max_length=128), AfterValidator(_wandb_project)]
    name: Annotated[Text, Field(min_length=1, max_length=128)] | None = None
    entity: Annotated[Text, Field(min_length=1, max_length=128)] | None = None
    tags: Annotated[list[Annotated[Text, Field(min_length=1, max_length=64)]], Field(max_length=64)] | None = None


class Integration(Wire):
    """A tracker that this job wants; others are switched on for all jobs by settings."""

    type: Literal["wandb"]
    wandb: Wandb


class WorkerRange(Wire):
    """As many train workers as the cluster has room for, within `min` and `max`."""

    min: PositiveInt
    max: PositiveInt

    @model_validator(mode="after")
    def _not_empty(self) -> WorkerRange:
        if self.min > self.max:
            raise ValueError("'min' must not be more than 'max'")
        return self


class CreateJob(Wire):
    """Body of POST /v1/fine_tuning/jobs: OpenAI's fields, then ours."""

    model: ObjectId
    training_file: ObjectId
    validation_file: ObjectId | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64), AfterValidator(_safe_suffix)] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: Metadata | None = None
    integrations: Annotated[list[Integration], Field(max_length=1)] | None = None
    hyperparameters: TopHyperparameters | None = None
    method: Method | None = None

    adapter: Adapter = Adapter()
    num_workers: PositiveInt | WorkerRange = 1
    parallel: Literal["data", "fsdp"] = "data"
    validation_split: Annotated[float, Field(ge=0, le=0.5)] = 0.0
    early_stopping: WireEarlyStopping | None = None
    precision: Literal["fp32", "bf16"] | Auto = AUTO
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    sample_prompts: Annotated[
        tuple[Annotated[Text, Field(min_length=1, max_length=2000)], ...], Field(strict=False, max_length=8)
    ] = ()
    eval_interval: Annotated[int, Field(ge=1, le=10**9)] | Auto = AUTO
    n_evals: Annotated[int, Field(ge=1, le=1000)] | None = None
    checkpoint_interval: Annotated[int, Field(ge=1, le=10**9)] | Auto = AUTO
    keep_checkpoints: Annotated[int, Field(ge=1, le=1000)] = 3
    sweep: Sweep | None = None

    @property
    def method_type(self) -> MethodType:
        """How to fine-tune; `supervised` unless the body says otherwise."""
        return "supervised" if self.method is None else self.method.type

    def workers(self) -> tuple[int | None, int]:
        """The training contract's `min_workers` and `num_workers`."""
        if isinstance(self.num_workers, WorkerRange):
            return self.num_workers.min, self.num_workers.max
        return None, self.num_workers

    def effective_hyperparameters(self) -> Hyperparameters:
        """Those of `method`, and for what it does not name the deprecated top-level ones: nothing given is dropped."""
        given = _given(self.hyperparameters, Hyperparameters) | _given(self._of_method(), Hyperparameters)
        return Hyperparameters.model_validate(given)

    def dpo_settings(self) -> DpoSpec | None:
        """What a job of the method `dpo` needs beside its hyperparameters; None for other methods."""
        if self.method_type != "dpo":
            return None
        return DpoSpec.model_validate(_given(self._of_method(), DpoSpec))

    def classification_settings(self) -> ClassificationSpec | None:
        """The same for the method `classification`."""
        if self.method_type != "classification":
            return None
        return ClassificationSpec.model_validate(_given(self._of_method(), ClassificationSettings))

    def embedding_settings(self) -> EmbeddingSpec | None:
        """The same for the method `embedding`."""
        if self.method_type != "embedding":
            return None
        return EmbeddingSpec.model_validate(_given(self._of_method(), EmbeddingSpec))

    def _of_method(self) -> WireHyperparameters | None:
        settings = None if self.method is None else getattr(self.method, self.method.type)
        return None if settings is None else settings.hyperparameters


def _given(chosen: BaseModel | None, contract: type[BaseModel]) -> dict[str, Any]:
    """The part of the settings that was sent and belongs to the contract."""
    return {} if chosen is None else chosen.model_dump(include=set(contract.model_fields), exclude_unset=True)


def check_base_id(base_id: str) -> str:
    """An id of a base: no colon, which separates the parts of fine-tuned models' ids."""
    if not _BASE_ID.fullmatch(base_id):
        raise ValueError(
            "use letters, digits, '.', '_' and '-', in parts joined by '/', each starting with a letter or digit"
        )
    return base_id


def check_alias_name(name: str) -> str:
    """A name of an alias: never one that an immutable model id could have."""
    if not _ALIAS_NAME.fullmatch(name) or len(name) > 128:
        raise ValueError("use up to 128 letters, digits, '.', '_', '-' and '/', starting with a letter or digit")
    return name


def _check_project_id(project_id: str) -> str:
    if not _PROJECT_ID.fullmatch(project_id):
        raise ValueError("it must be 'proj-' and up to 59 letters, digits or dashes")
    return project_id


class CreateBase(Wire):
    """Body of POST /v1/bases: a folder of this machine, or a Hub id, under the name that requests will use."""

    id: Annotated[str, Field(min_length=1, max_length=64), AfterValidator(check_base_id)]
    source: Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_storable)]
    revision: Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_storable)] | None = None


class PutAlias(Wire):
    """Body of PUT /v1/aliases/{name}."""

    model: ObjectId


Scope = Literal["admin", "files", "jobs", "models", "inference"]


class CreateKey(Wire):
    """Body of POST /v1/keys. Without scopes the key may do everything but administer."""

    name: Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_storable)]
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=5)] = ["files", "jobs", "models", "inference"]
    project_id: Annotated[str, AfterValidator(_check_project_id)] | None = None
