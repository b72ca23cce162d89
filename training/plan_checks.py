"""What of a request cannot work, as far as its base alone can tell: no row is read."""

from __future__ import annotations

from math import ceil

from training.model_shape import ModelShape, is_known
from training.spec import AUTO, LoraSpec, TrainSpec


class PlanError(ValueError):
    """A job that cannot work as asked; `param` is the request field to change."""

    def __init__(self, code: str, message: str, param: str | None) -> None:
        super().__init__(code, message, param)
        self.code = code
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message


def hyper_field(spec: TrainSpec) -> str:
    """Where the hyperparameters stand in a request."""
    return f"method.{spec.method}.hyperparameters"


def check_method(spec: TrainSpec, shape: ModelShape) -> None:
    """PlanError if the base cannot learn by the method."""
    able = shape.methods()
    if spec.method not in able:
        can = f"it can be fine-tuned by {' or '.join(able)}" if able else "no method can start from it"
        message = f"The base {spec.base.id}, a {shape.architecture}, cannot learn by the method {spec.method}; {can}."
        raise PlanError("invalid_base_model", message, "model")


def check_request(spec: TrainSpec, shape: ModelShape) -> None:
    """PlanError for settings that contradict each other or the base."""
    hyper = spec.hyperparameters
    if not is_known(shape.architecture):
        message = f"The base is a {shape.architecture}, which the installed transformers does not know."
        raise PlanError("invalid_base_model", message, "model")
    given = hyper.learning_rate != AUTO and hyper.learning_rate_multiplier not in (AUTO, 1.0)
    if given and spec.unresolved():  # a resolved spec holds both, and its learning_rate is already the product
        message = "learning_rate is absolute; give it or learning_rate_multiplier, not both."
        raise PlanError("invalid_value", message, f"{hyper_field(spec)}.learning_rate_multiplier")
    if hyper.max_length != AUTO and hyper.max_length > shape.longest(spec.method):
        message = (
            f"max_length {hyper.max_length} is more than the base's context of {shape.longest(spec.method)} tokens."
        )
        raise PlanError("invalid_value", message, f"{hyper_field(spec)}.max_length")
    if hyper.batch_size != AUTO and hyper.batch_size < spec.num_workers:
        message = f"batch_size {hyper.batch_size} is less than num_workers {spec.num_workers}: a worker would be idle."
        raise PlanError("invalid_value", message, f"{hyper_field(spec)}.batch_size")
    if spec.parallel == "fsdp" and spec.least_workers() == 1:
        message = "One worker has nobody to share the weights with: parallel 'fsdp' needs num_workers of 2 or more."
        if spec.min_workers is not None:
            message = "A run may come to one worker, which has nobody to share the weights with: parallel 'fsdp' needs "
            message += "a min of 2 or more in num_workers."
        raise PlanError("invalid_value", message, "parallel")
    if spec.parallel == "fsdp" and spec.method in ("classification", "embedding"):
        message = f"Weights are spread for language models only; the method {spec.method} needs parallel 'data'."
        raise PlanError("invalid_value", message, "parallel")
    if spec.parallel == "fsdp" and spec.sample_prompts:
        message = "Samples are written by one worker alone, which cannot be with parallel 'fsdp'; leave them out."
        raise PlanError("invalid_value", message, "sample_prompts")
    if spec.sample_prompts and spec.method in ("classification", "embedding"):
        message = f"A model that learns by the method {spec.method} writes no text; leave the sample prompts out."
        raise PlanError("invalid_value", message, "sample_prompts")
    if spec.early_stopping is not None and not spec.validates():
        message = "early_stopping needs a validation file or a validation_split."
        raise PlanError("invalid_value", message, "early_stopping")
    if spec.adapter is not None:
        _check_adapter(spec.adapter, shape)


def _check_adapter(adapter: LoraSpec, shape: ModelShape) -> None:
    if adapter.rank != AUTO and adapter.rank > shape.hidden_size:
        message = f"LoRA rank {adapter.rank} is more than the model's width of {shape.hidden_size}."
        raise PlanError("invalid_value", message, "adapter.rank")
    if not shape.adapted(adapter.targets):
        missing = "linear layers" if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
        known = sorted({name.rsplit(".", 1)[-1] for name in shape.linear_weights()})
        raise PlanError("invalid_value", f"The base has no {missing}; it has {', '.join(known)}.", "adapter.targets")
    if any(map(shape.is_read_past, shape.adapted(adapter.targets))):
        known = sorted({n.rsplit(".", 1)[-1] for n in shape.linear_weights() if not shape.is_read_past(n)})
        others = f"name targets outside of them ({', '.join(known)}) or " if known else ""
        message = f"State-space blocks, as in this {shape.model_type}, take no adapter: {others}train all weights."
        raise PlanError("invalid_value", message, "adapter.targets")
    if isinstance(adapter.targets, str):
        return
    for target in adapter.targets:
        if not shape.adapted((target,)):
            known = sorted({name.rsplit(".", 1)[-1] for name in shape.linear_weights()})
            message = f"The base has no linear layer {target!r}; it has {', '.join(known)}."
            raise PlanError("invalid_value", message, "adapter.targets")


def check_batches(spec: TrainSpec) -> None:
    """PlanError if a resolved batch cannot be shared out as asked."""
    hyper = spec.hyperparameters
    assert hyper.batch_size != AUTO and hyper.gradient_accumulation_steps != AUTO
    per_worker = ceil(hyper.batch_size / spec.num_workers)
    if hyper.gradient_accumulation_steps > per_worker:
        message = (
            f"gradient_accumulation_steps {hyper.gradient_accumulation_steps} is more than the {per_worker} examples "
            f"that each worker gets of a batch of {hyper.batch_size}."
        )
        raise PlanError("invalid_value", message, f"{hyper_field(spec)}.gradient_accumulation_steps")
    if spec.method == "embedding" and per_worker < 2 * hyper.gradient_accumulation_steps:
        message = (
            "Examples need others in their micro-batch as negatives: use a larger batch_size or less accumulation."
        )
        raise PlanError("invalid_value", message, f"{hyper_field(spec)}.batch_size")
