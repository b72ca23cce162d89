"""Planning: resolve "auto", count tokens, estimate memory; refuse what cannot work, before any accelerator is taken.

Reads the base's configuration and safetensors headers, and renders every record once. No torch. The rules of "auto"
are in `training.auto`, the estimates in `training.estimate`; the examples come from `training.examples`, which the
loop uses as well.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from training import auto, estimate
from training.auto import unless_given as _or
from training.examples import ExamplesError, load_examples
from training.failure import Failure
from training.labels import count_labels, problem_of, warnings_of, with_counts
from training.model_shape import ModelShape, ShapeError
from training.plan_checks import PlanError, check_batches, check_method, check_request
from training.records import ChatRecord, first_record, sequences_of
from training.render import Example, Renderer, RenderError
from training.sample_prompts import PromptError, encode_prompts
from training.spec import AUTO, Contract, Hyperparameters, TrainSpec
from training.start import check_start
from training.storage import Storage

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["MIN_EXAMPLES", "Plan", "PlanError", "load_examples", "plan"]

MIN_EXAMPLES = 10  # OpenAI's minimum
_NO_STOP = "The template does not end assistant turns with a stop token; the model will not learn to stop."
_NO_EOS = "The base has no end-of-text token; the model will not learn to stop."
_BORDER = (
    "What serving sends before an answer is not what stands before it in training: the template's generation prompt "
    "differs from its assistant header, or a token spans the border between the two."
)


class Plan(Contract):
    """What will be run, in numbers."""

    spec: TrainSpec  # resolved: nothing left on auto
    num_examples: int  # for training, after the split
    num_validation_examples: int
    num_tokens: int  # of one epoch; both sides of a preference count
    num_trained_tokens: int  # of one epoch: tokens with a loss
    num_validation_tokens: int
    max_example_tokens: int
    total_steps: int  # optimizer steps: n_epochs * ceil(num_examples / batch_size)
    peak_memory_bytes: int  # per worker: of its process, or of its GPU
    checkpoint_bytes: int  # of one
    artifact_bytes: int
    warnings: list[str]


@dataclass(frozen=True)
class _Counts:
    """Tokens of each example of a set, and of them those with a loss."""

    tokens: estimate.Counts
    trained: estimate.Counts

    @property
    def num_examples(self) -> int:
        return len(self.tokens)

    @property
    def num_tokens(self) -> int:
        return int(self.tokens.sum())

    @property
    def max_tokens(self) -> int:
        return int(self.tokens.max(initial=0))


def plan(spec: TrainSpec, storage: Storage, *, on_gpu: bool = False) -> Plan:
    """The resolved spec with counts and estimates; PlanError if the job cannot work. A resolved spec stays as it is.
    `on_gpu` says what kind of memory the workers have."""
    folder = storage.local_folder(spec.base.key)
    try:
        check_start(spec, storage)
        shape = ModelShape(folder)
        check_method(spec, shape)
        check_request(spec, shape)
        renderer = Renderer.load(folder)
        encode_prompts(spec, storage, renderer, shape.max_context)
    except PromptError as error:
        raise PlanError("invalid_value", str(error), "sample_prompts") from error
    except Failure as error:
        raise PlanError(error.code, error.message, error.param) from error
    except ShapeError as error:
        raise PlanError("invalid_base_model", f"The base model cannot be used: {error}", "model") from error
    except RenderError as error:
        raise PlanError("invalid_base_model", f"The base's tokenizer cannot be used: {error}", "model") from error
    _check_has_template(spec, storage, renderer)
    spec = _with_labels(spec, storage)
    with tempfile.TemporaryDirectory(prefix="plan-") as scratch:
        train, validation = _load(spec, storage, Path(scratch))
        num_valid = 0 if validation is None else len(validation)
        num_given = len(train) + (num_valid if spec.validation_key is None else 0)
        _check_num_examples(num_given, num_valid, spec)
        counts, validated = _count(train), _count(validation)
        num_cut, num_pieces = _cuts(train, validation)
        if spec.classification is not None:
            spec = with_counts(spec, train["label"])
            warnings = warnings_of(spec)
        else:
            warnings = [] if spec.embedding is not None else _warnings_on_tokens(train, renderer, spec, storage)
    resolved = _resolve(spec, shape, counts)
    check_batches(resolved)
    hyper = resolved.hyperparameters
    if num_cut:
        allowed = f"the {hyper.max_length} tokens that are allowed"
        warnings.append(f"Texts longer than {allowed} were cut: {num_cut} rows into {num_pieces} pieces.")
    assert hyper.n_epochs != AUTO and hyper.batch_size != AUTO
    if hyper.batch_size > counts.num_examples:
        warnings.append(f"batch_size {hyper.batch_size} is more than the {counts.num_examples} training examples.")
    return Plan(
        spec=resolved,
        num_examples=counts.num_examples,
        num_validation_examples=num_valid,
        num_tokens=counts.num_tokens,
        num_trained_tokens=int(counts.trained.sum()),
        num_validation_tokens=validated.num_tokens,
        max_example_tokens=max(counts.max_tokens, validated.max_tokens),
        total_steps=_total_steps(hyper, counts.num_examples),
        peak_memory_bytes=estimate.peak_memory(resolved, shape, counts.tokens, counts.trained, on_gpu=on_gpu),
        checkpoint_bytes=estimate.checkpoint_bytes(resolved, shape),
        artifact_bytes=estimate.artifact_bytes(resolved, shape),
        warnings=warnings,
    )


# -- checks on the data ------------------------------------------------------------------------------------------------


def _load(spec: TrainSpec, storage: Storage, scratch: Path) -> tuple[Dataset, Dataset | None]:
    try:
        return load_examples(spec, storage, scratch)
    except ExamplesError as error:
        what = "training" if error.param == "training_file" else "validation"
        text = f"The {what} file cannot be used with this base and these settings: {error}"
        raise PlanError(f"invalid_{what}_file", text, error.param) from error


def _first_record(spec: TrainSpec, storage: Storage) -> Any:
    """What the model would read first; None if the first line is no record."""
    with storage.open_read(spec.training_key) as file:
        record = first_record(file)
    return None if record is None else sequences_of(record)[0]


def _check_has_template(spec: TrainSpec, storage: Storage, renderer: Renderer) -> None:
    if isinstance(_first_record(spec, storage), ChatRecord) and not renderer.has_chat_template:
        message = (
            "The base has no chat template, so it cannot be trained on chat records; use prompt/completion or text."
        )
        raise PlanError("invalid_training_file", message, "training_file")


def _check_num_examples(num_given: int, num_validation: int, spec: TrainSpec) -> None:
    if num_given < MIN_EXAMPLES:
        message = f"The training file has {num_given} examples, and at least {MIN_EXAMPLES} are needed."
        raise PlanError("invalid_training_file", message, "training_file")
    if spec.validation_key is not None and num_validation == 0:
        raise PlanError("invalid_validation_file", "The validation file holds no examples.", "validation_file")


def _with_labels(spec: TrainSpec, storage: Storage) -> TrainSpec:
    """The spec of a classification with the labels of its training file."""
    if spec.classification is None or spec.classification.labels != AUTO:
        return spec
    counts = count_labels(storage, spec.training_key)
    if (problem := problem_of(counts)) is not None:
        raise PlanError("invalid_training_file", f"The training file cannot be used: {problem}.", "training_file")
    found = spec.classification.model_copy(update={"labels": tuple(counts)})
    return spec.model_copy(update={"classification": found})


def _count(examples: Dataset | None) -> _Counts:
    import pyarrow.compute as pc

    if not examples:
        return _Counts(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    table = examples.with_format("arrow")[:]
    lengths = pc.list_value_length(table["input_ids"]).to_numpy().astype(np.int64)
    trained = pc.cast(pc.list_flatten(table["trained"]), "int64").to_numpy()
    return _Counts(lengths, np.add.reduceat(trained, np.cumsum(lengths) - lengths))  # no example is empty


def _warnings_on_tokens(examples: Dataset, renderer: Renderer, spec: TrainSpec, storage: Storage) -> list[str]:
    """What is legal but makes a poor model."""
    record, row = _first_record(spec, storage), examples[0]
    first = Example(tuple(row["input_ids"]), tuple(row["trained"]))
    if not renderer.ends_with_stop(first):
        return [_NO_STOP if isinstance(record, ChatRecord) else _NO_EOS]
    if isinstance(record, ChatRecord) and not _border_holds(record, renderer):
        return [_BORDER]
    return []


def _cuts(*sets: Dataset | None) -> tuple[int, int]:
    """How many rows of plain text were longer than allowed, and how many pieces they were cut into."""
    pieces = np.concatenate([np.asarray(examples["piece"][:]) for examples in sets if examples])
    num_cut = int((pieces == 1).sum())
    return num_cut, num_cut + int((pieces > 0).sum())


def _border_holds(record: ChatRecord, renderer: Renderer) -> bool:
    """Whether the ids that serving would send before the last answer are those that stand before it in training."""
    if record.messages[-1].weight == 0:
        return True
    messages = [message.model_dump(mode="json", exclude_none=True) for message in record.messages]
    try:
        prompt = renderer.encode_prompt(messages[:-1], list(record.tools) if record.tools else None)
    except RenderError:
        return True  # a template that wants the whole conversation; nothing can be said
    example = renderer.encode_example(record)
    return list(example.token_ids[: len(prompt)]) == prompt and example.trained[len(prompt)]


# -- resolving ---------------------------------------------------------------------------------------------------------


def _resolve(spec: TrainSpec, shape: ModelShape, counts: _Counts) -> TrainSpec:
    """The spec with numbers in place of every auto."""
    hyper, lora = spec.hyperparameters, spec.adapter is not None
    epochs = _or(hyper.n_epochs, auto.n_epochs(counts.num_examples, spec.method, len(spec.labels())))
    batch = _or(hyper.batch_size, auto.batch_size(counts.num_examples, spec.num_workers, spec.method))
    multiplier = _or(hyper.learning_rate_multiplier, 1.0)
    rate = auto.learning_rate(shape.hidden_size, lora=lora, method=spec.method)
    mean_tokens = counts.num_tokens / counts.num_examples
    accumulation = auto.gradient_accumulation_steps(batch, spec.num_workers, mean_tokens, spec.method)
    resolved = {
        "n_epochs": epochs,
        "batch_size": batch,
        "learning_rate_multiplier": multiplier,
        "learning_rate": _or(hyper.learning_rate, rate * multiplier),
        "gradient_accumulation_steps": _or(hyper.gradient_accumulation_steps, accumulation),
        "max_length": _or(hyper.max_length, shape.longest(spec.method)),
    }
    hyper = hyper.model_copy(update=resolved)
    total = _total_steps(hyper, counts.num_examples)
    adapter = spec.adapter
    if adapter is not None:
        rank = _or(adapter.rank, auto.lora_rank(shape.hidden_size))
        alpha = _or(adapter.alpha, auto.lora_alpha(rslora=adapter.rslora))
        adapter = adapter.model_copy(update={"rank": rank, "alpha": alpha})
    changes = {
        "hyperparameters": hyper,
        **auto.method_settings(spec),
        "adapter": adapter,
        "precision": _or(spec.precision, auto.precision(shape.num_parameters, spec.method)),
        "eval_interval": _or(spec.eval_interval, auto.eval_interval(total, spec.n_evals)),
        "checkpoint_interval": _or(spec.checkpoint_interval, auto.checkpoint_interval(total)),
    }
    return TrainSpec.model_validate(spec.model_copy(update=changes).model_dump())


def _total_steps(hyper: Hyperparameters, num_examples: int) -> int:
    assert hyper.n_epochs != AUTO and hyper.batch_size != AUTO
    return hyper.n_epochs * ceil(num_examples / hyper.batch_size)
