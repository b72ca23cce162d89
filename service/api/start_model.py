"""From the model that a create names to the weights its run starts from: a base's, or those of an earlier fine-tune."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.orm import Session

from service.api.schemas import Adapter, CreateJob
from service.auth import Caller
from service.errors import InvalidRequest
from service.jobs.states import JobState
from service.platform import Platform
from service.store import bases, jobs, models
from service.store.tables import BaseModel, Model
from training.spec import AUTO, BaseRef, LoraSpec, StartRef, TrainSpec

MAX_PARAMETERS_OF_SMALL = 100_000_000
# What a base must be able to do for a method, and what to say if it cannot.
_NEEDED = {
    "supervised": ("completions", "does not write text, as an encoder never does"),
    "dpo": ("completions", "does not write text, as an encoder never does"),
    "embedding": ("embed", "is no encoder"),
}
KEPT = ("rank", "alpha", "rslora", "dora", "targets")  # of an adapter that is trained on; its dropout may change


@dataclass(frozen=True)
class Start:
    """Where a run begins, and what it trains."""

    base: BaseRef
    model: StartRef | None  # None: the base itself
    adapter: LoraSpec | None


def find_start(tx: Session, platform: Platform, who: Caller, body: CreateJob) -> Start:
    """The start of a job. InvalidRequest if the model cannot be trained on, or not in the way that is asked for."""
    target = platform.catalog.resolve(tx, who.project_id, body.model)
    base = bases.get(tx, target.base_id)
    assert base.storage_key is not None
    assert base.content_hash is not None
    ref = BaseRef(id=base.id, key=base.storage_key, content_hash=base.content_hash)
    if target.kind == "base":
        _check_can_learn(base, body)
        return Start(ref, None, _adapter(base, body))
    model = models.hold(tx, who.project_id, target.model_id)
    _check_lasts(tx, model)
    before = TrainSpec.model_validate(model.spec)
    _check_goes_on(before.method, body.method_type, model.id)
    asked = body.adapter if "adapter" in body.model_fields_set else None
    adapter = _continued(before.adapter, asked, model.id)
    return Start(ref, StartRef(model_id=model.id, key=model.storage_key, manifest_hash=model.manifest_hash), adapter)


def _check_can_learn(base: BaseModel, body: CreateJob) -> None:
    needed, problem = _NEEDED.get(body.method_type, (None, ""))
    if needed is not None and needed not in base.capabilities:
        message = (
            f"Invalid value for 'model': '{body.model}' ({base.architecture}) {problem}, so it cannot learn by the "
            f"method '{body.method_type}'."
        )
        raise InvalidRequest(message, param="model", code="invalid_base_model")


def _adapter(base: BaseModel, body: CreateJob) -> LoraSpec | None:
    """What the body says; where it does not, a small encoder trains all its weights, no slower and better."""
    is_small = base.num_parameters is not None and base.num_parameters < MAX_PARAMETERS_OF_SMALL
    if body.method_type in ("classification", "embedding") and "adapter" not in body.model_fields_set and is_small:
        return None
    return body.adapter.to_spec()


def _check_goes_on(before: str, method: str, model_id: str) -> None:
    """A label head knows the labels of its own job only, and an encoder's fine-tune does not write."""
    writes = {"supervised", "dpo"}
    if {before, method} <= writes or before == method == "embedding":
        return
    message = (
        f"'{model_id}' learned by the method '{before}', and '{method}' cannot go on from there; start from its base."
    )
    raise InvalidRequest(message, param="model", code="invalid_base_model")


def _check_lasts(tx: Session, model: Model) -> None:
    """A running job deletes its older checkpoints."""
    if model.is_checkpoint and model.job_id is not None:
        job = jobs.by_id(tx, model.job_id)
        if not JobState(job.state).is_terminal:
            message = f"The job '{job.id}' still runs and may delete its checkpoint '{model.id}'; wait until it ends."
            raise InvalidRequest(message, param="model")


def _continued(before: LoraSpec | None, asked: Adapter | None, model_id: str) -> LoraSpec | None:
    """The settings of the earlier fine-tune: other ones than its own would not fit its weights."""
    if asked is None:
        return before
    if (before is None) != (asked.type == "none"):
        kind, own = ("all weights", "none") if before is None else ("an adapter", "lora")
        message = f"'{model_id}' is a fine-tune of {kind}, and a job that starts from it is one too: use type '{own}'."
        raise InvalidRequest(message, param="adapter.type")
    if before is None:
        return None
    for name in KEPT:
        value, kept = getattr(asked, name), getattr(before, name)
        same = set(value) == set(kept) if isinstance(value, tuple) and isinstance(kept, tuple) else value == kept
        if name in asked.model_fields_set and value != AUTO and not same:
            message = f"The adapter '{model_id}' has {name} {_shown(kept)}, and a job that starts from it keeps that."
            raise InvalidRequest(message, param=f"adapter.{name}")
    return before.model_copy(update={"dropout": asked.dropout} if "dropout" in asked.model_fields_set else {})


def _shown(value: object) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)
