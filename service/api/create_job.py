"""From the body of a create to a job row: checks, the training spec, and the job of a create that was retried."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from service.api.schemas import CreateJob
from service.api.start_model import find_start
from service.api.sweep_checks import check_rank_is_free, check_sweep
from service.auth import Caller
from service.errors import InvalidRequest, NotFound, UnsupportedParameter
from service.jobs.states import JobKind
from service.platform import Platform
from service.settings import Settings
from service.store import events, files, jobs, keys
from service.store.tables import File, Job
from service.trackers.chosen import why_no_wandb
from training.artifact import canonical_json
from training.spec import AUTO, EarlyStopping, Hyperparameters, TrainSpec

MADE_BY_RETRY = "_made_by_retry"  # mark in a job's stored request; no field of a body can have this name
MAX_SHOWN_FAULTS = 3


@dataclass(frozen=True)
class Attempt:
    """What tells a retried create from a deliberate second one."""

    retry_count: int
    idempotency_key: str
    received_at: float


def create_job(tx: Session, platform: Platform, who: Caller, body: CreateJob, attempt: Attempt) -> Job:
    """The new job, or the first one's if this create is a retry. Runs inside one write transaction."""
    sent = body.model_dump(mode="json", exclude_unset=True)
    request_hash = hashlib.sha256(canonical_json([who.key_id, attempt.idempotency_key, sent])).hexdigest()
    # Takes the key's row lock: two creates of one key come here one after the other, also on PostgreSQL.
    keys.touch(tx, who.key_id)
    tx.flush()
    first = _first_of_retries(tx, request_hash, platform.settings.retry_window_s, attempt)
    if first is not None:
        return first
    spec = build_spec(tx, platform, who, body)
    job = jobs.create(
        tx,
        project_id=who.project_id,
        created_by=who.key_id,
        kind=JobKind.FINE_TUNING if body.sweep is None else JobKind.SWEEP,
        sweep=None if body.sweep is None else body.sweep.model_dump(mode="json"),
        method=spec.method,
        priority=body.priority,
        base_id=spec.base.id,
        parent_model_id=spec.start.model_id if spec.start else None,
        training_file_id=body.training_file,
        validation_file_id=body.validation_file,
        suffix=body.suffix,
        request={**sent, MADE_BY_RETRY: True} if attempt.retry_count else sent,
        request_hash=request_hash,
        spec=spec.model_dump(mode="json"),
        user_metadata=body.metadata or None,  # an empty object is none, also to the list's `metadata=null`
    )
    events.add(tx, job, f"Created fine-tuning job: {job.id}")
    events.add(tx, job, f"Validating training file: {body.training_file}")
    return job


def _first_of_retries(tx: Session, request_hash: str, window_s: float, attempt: Attempt) -> Job | None:
    found = jobs.find_retried(tx, request_hash, window_s)
    if found is None or attempt.retry_count or attempt.idempotency_key:
        return found
    # The client gave up waiting for us, and its retry overtook this request and made the job already.
    overtaken = found.created_at >= attempt.received_at and MADE_BY_RETRY in found.request
    return found if overtaken else None


def build_spec(tx: Session, platform: Platform, who: Caller, body: CreateJob) -> TrainSpec:
    """What the body asks for, checked as far as no file has to be read."""
    chosen = body.effective_hyperparameters()
    _check_combinations(body, chosen, platform.settings.max_train_workers)
    _check_integrations(body, platform.settings)
    if body.sweep is not None:
        check_sweep(body, body.sweep, chosen)
    start = find_start(tx, platform, who, body)
    if body.sweep is not None:
        check_rank_is_free(body.sweep, start.adapter, continues=start.model is not None)
    training = _usable_file(tx, who, body.training_file, "training_file")
    validation = None
    if body.validation_file is not None:
        validation = _usable_file(tx, who, body.validation_file, "validation_file")
    min_workers, num_workers = body.workers()
    return TrainSpec(
        base=start.base,
        start=start.model,
        method=body.method_type,
        dpo=body.dpo_settings(),
        classification=body.classification_settings(),
        embedding=body.embedding_settings(),
        training_key=training.storage_key,
        validation_key=validation.storage_key if validation else None,
        validation_split=body.validation_split,
        adapter=start.adapter,
        hyperparameters=chosen,
        precision=body.precision,
        seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
        num_workers=num_workers,
        min_workers=min_workers,
        parallel=body.parallel,
        eval_interval=body.eval_interval,
        n_evals=body.n_evals,
        checkpoint_interval=body.checkpoint_interval,
        keep_checkpoints=body.keep_checkpoints,
        sample_prompts=body.sample_prompts,
        early_stopping=EarlyStopping(**body.early_stopping.model_dump()) if body.early_stopping else None,
    )


def _check_combinations(body: CreateJob, chosen: Hyperparameters, max_workers: int) -> None:
    if chosen.learning_rate != AUTO and chosen.learning_rate_multiplier != AUTO:
        raise InvalidRequest(
            "'learning_rate' is absolute; leave 'learning_rate_multiplier' out or on 'auto' beside it.",
            param=f"method.{body.method_type}.hyperparameters.learning_rate_multiplier",
        )
    if body.validation_file is not None and body.validation_split:
        raise InvalidRequest(
            "'validation_split' holds examples out where no 'validation_file' is given; give one of them.",
            param="validation_split",
        )
    if body.early_stopping is not None and body.validation_file is None and not body.validation_split:
        raise InvalidRequest(
            "'early_stopping' watches the validation loss; give a 'validation_file' or a 'validation_split' with it.",
            param="early_stopping",
        )
    if body.n_evals is not None and body.eval_interval != AUTO:
        raise InvalidRequest(
            "'n_evals' spreads so many evaluations over the run, 'eval_interval' is the steps between two; give one.",
            param="n_evals",
        )
    min_workers, num_workers = body.workers()
    if num_workers > max_workers:
        param = "num_workers" if min_workers is None else "num_workers.max"
        message = f"Invalid value for '{param}': this service allows at most {max_workers}."
        raise InvalidRequest(message, param=param)


def _check_integrations(body: CreateJob, settings: Settings) -> None:
    why_not = why_no_wandb(settings)
    if body.integrations and why_not:
        message = f"Unsupported parameter: 'integrations.0' asks for Weights & Biases. {why_not}"
        raise UnsupportedParameter(message, param="integrations.0")


def _usable_file(tx: Session, who: Caller, file_id: str, param: str) -> File:
    """A file that may still be validating; one known to be unusable is refused now."""
    code = f"invalid_{param}"
    try:
        file = files.hold(tx, who.project_id, file_id)
    except NotFound:
        raise InvalidRequest(f"Invalid {param}: no file with id '{file_id}'.", param=param, code=code) from None
    if file.purpose != "fine-tune":
        message = f"Invalid {param}: '{file_id}' was uploaded with purpose '{file.purpose}', not 'fine-tune'."
        raise InvalidRequest(message, param=param, code=code)
    if file.status == "error":
        message = f"Invalid {param}: '{file_id}' has faults. {_first_faults(file)}"
        raise InvalidRequest(message, param=param, code=code)
    return file


def _first_faults(file: File) -> str:
    report: dict[str, Any] = file.report or {}
    shown = [f"line {fault['line']}: {fault['message']}" for fault in report.get("errors", [])[:MAX_SHOWN_FAULTS]]
    return "; ".join(shown) or file.status_details or "It could not be read."
