"""Rows as OpenAI's JSON objects. Pure: no SQL, no request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from service.jobs.states import JobState
from service.jobs.sweeps import Trial, find_best
from service.store.aliases import Current
from service.store.tables import BaseModel, Checkpoint, Event, Job, Key, Model

TOP_HYPERPARAMETERS = ("n_epochs", "batch_size", "learning_rate_multiplier", "beta")  # the last one where it has one
FOUND_IN_THE_DATA = ("labels", "label_counts")  # parts of a spec that nobody chooses
RESOLVED_FIELDS = (
    "precision",
    "parallel",
    "validation_split",
    "early_stopping",
    "eval_interval",
    "n_evals",
    "checkpoint_interval",
    "keep_checkpoints",
)

Json = dict[str, Any]


def _seconds(at: float | None) -> int | None:
    return None if at is None else int(at)


def job_json(job: Job, organization: str, trials: Sequence[Job] = ()) -> Json:
    """A fine-tuning job. Hyperparameters come from the stored spec: 'auto' until the plan has put numbers there.

    A sweep needs its trials beside it; those of other sweeps are passed over. Once it is over, its hyperparameters are
    the best trial's.
    """
    chosen = _hyperparameters(job.spec, job.method)
    succeeded = job.state == JobState.SUCCEEDED
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "finished_at": _seconds(job.finished_at),
        "estimated_finish": _seconds(job.estimated_finish_at),
        "model": job.parent_model_id or job.base_id,
        "fine_tuned_model": job.fine_tuned_model if succeeded else None,
        "organization_id": organization,
        "status": job.state,
        "training_file": job.training_file_id,
        "validation_file": job.validation_file_id,
        "result_files": job.result_file_ids,
        "trained_tokens": job.trained_tokens if succeeded else None,
        "hyperparameters": {name: chosen[name] for name in TOP_HYPERPARAMETERS if name in chosen},
        "method": {"type": job.method, job.method: {"hyperparameters": chosen}},
        "seed": job.spec["seed"],
        "error": job.error,
        "integrations": _integrations_json(job),
        "metadata": job.user_metadata,
        "suffix": job.suffix,
        "adapter": _adapter_json(job.spec["adapter"]),
        "num_workers": _workers_json(job.spec),
        "parallel": job.spec.get("parallel", "data"),  # jobs of an earlier version have none
        "validation_split": job.spec["validation_split"],
        "early_stopping": job.spec.get("early_stopping"),
        "sample_prompts": job.spec.get("sample_prompts", []),
        "precision": job.spec["precision"],
        "eval_interval": job.spec["eval_interval"],
        "n_evals": job.spec.get("n_evals"),  # jobs of an earlier version have none
        "checkpoint_interval": job.spec["checkpoint_interval"],
        "keep_checkpoints": job.spec["keep_checkpoints"],
        "priority": job.priority,
        "plan": job.plan,
        "desired": job.desired,
        "state_version": job.state_version,
        "started_at": _seconds(job.started_at),
        "kind": job.kind,
        "sweep": None if job.sweep is None else _sweep_json(job, [t for t in trials if t.parent_job_id == job.id]),
        "parent": job.parent_job_id,
        "trial": None if job.trial is None else {"number": job.trial_number, **job.trial},
    }


def _sweep_json(job: Job, trials: list[Job]) -> Json:
    """What was asked, and every combination with how it does; one that has not begun has no job yet."""
    combinations = (job.plan or {}).get("trials", [])
    rows: dict[int | None, Json] = {
        number: {"number": number, "job_id": None, "status": None, **Trial(parameters=parameters).model_dump()}
        for number, parameters in enumerate(combinations, start=1)
    }
    for trial in trials:
        rows[trial.trial_number] = {
            "number": trial.trial_number,
            "job_id": trial.id,
            "status": trial.state,
            **(trial.trial or {}),
        }
    best = find_best(trials)
    return {
        **(job.sweep or {}),
        "trials": list(rows.values()),
        "best_trial": None if best is None else best.trial_number,
    }


def plan_json(plan: Json, seed: int | None) -> Json:
    """What a job would be. Without a seed of its own every create draws another one."""
    spec, method = plan["spec"], plan["spec"]["method"]
    hyperparameters = _hyperparameters(spec, method)
    n_epochs = hyperparameters["n_epochs"]
    return {
        "object": "fine_tuning.job.plan",
        "model": (spec["start"] or {}).get("model_id") or spec["base"]["id"],
        "num_examples": plan["num_examples"],
        "num_validation_examples": plan["num_validation_examples"],
        "num_tokens_per_epoch": plan["num_tokens"],
        "num_trained_tokens_per_epoch": plan["num_trained_tokens"],
        "num_tokens": plan["num_tokens"] * n_epochs,
        "num_trained_tokens": plan["num_trained_tokens"] * n_epochs,
        "max_example_tokens": plan["max_example_tokens"],
        "total_steps": plan["total_steps"],
        "num_workers": _workers_json(spec),
        "peak_memory_bytes": plan["peak_memory_bytes"],
        "duration_s": plan["duration_s"],
        "time_basis": plan["time_basis"],
        "disk": plan["disk"],
        "serving": plan["serving"],
        "warnings": plan["warnings"],
        "resolved": {
            "method": {"type": method, method: {"hyperparameters": hyperparameters}},
            "adapter": _adapter_json(spec["adapter"]),
            "seed": seed,
            **{name: spec[name] for name in RESOLVED_FIELDS},
        },
    }


def _workers_json(spec: Json) -> int | Json:
    """As it was asked for: a number, or a range."""
    least = spec.get("min_workers")  # jobs of an earlier version have none
    return spec["num_workers"] if least is None else {"min": least, "max": spec["num_workers"]}


def _hyperparameters(spec: Json, method: str) -> Json:
    """All that can be chosen, a method's own beside the others."""
    own = {name: value for name, value in (spec.get(method) or {}).items() if name not in FOUND_IN_THE_DATA}
    return {**spec["hyperparameters"], **own}


def _integrations_json(job: Job) -> list[Json] | None:
    asked = job.request.get("integrations") or []
    names = ("project", "name", "entity", "tags")
    return [{"type": one["type"], "wandb": {name: one["wandb"].get(name) for name in names}} for one in asked] or None


def _adapter_json(adapter: Json | None) -> Json:
    return {"type": "none"} if adapter is None else {"type": "lora", **adapter}


def event_json(event: Event) -> Json:
    """A line of a job's event list."""
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_at),
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data,
    }


def checkpoint_json(checkpoint: Checkpoint) -> Json:
    """A checkpoint; `fine_tuned_model_checkpoint` is a model that can be called."""
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(checkpoint.created_at),
        "fine_tuning_job_id": checkpoint.job_id,
        "fine_tuned_model_checkpoint": checkpoint.model_id,
        "step_number": checkpoint.step,
        "metrics": {"step": checkpoint.step, **checkpoint.metrics},
    }


def base_as_model_json(base: BaseModel) -> Json:
    """A base in the list of models."""
    return {
        "id": base.id,
        "object": "model",
        "created": int(base.created_at),
        "owned_by": "base",
        "kind": "base",
        "parent": None,
        "root": base.id,
        "job_id": None,
        "max_model_len": base.max_context,
        "capabilities": base.capabilities,
        "fingerprint": base.fingerprint,
    }


def model_json(model: Model, max_model_len: int | None, organization: str) -> Json:
    """A fine-tuned model or a checkpoint of one."""
    return {
        "id": model.id,
        "object": "model",
        "created": int(model.created_at),
        "owned_by": organization,
        "kind": model.kind,
        "parent": model.parent_id or model.base_id,
        "root": model.id,
        "job_id": model.job_id,
        "max_model_len": max_model_len,
        "capabilities": model.capabilities,
        "fingerprint": model.fingerprint,
        "is_checkpoint": model.is_checkpoint,
    }


def alias_as_model_json(alias: Current, target: Json, organization: str) -> Json:
    """An alias in the list of models, so that applications offer it; `root` is what it stands for now."""
    revision, _ = alias
    own = {"id": revision.name, "created": int(revision.created_at), "owned_by": organization}
    return {**target, **own, "kind": "alias", "root": target["id"]}


def base_json(base: BaseModel) -> Json:
    """A base as its administrator sees it."""
    return {
        "id": base.id,
        "object": "base",
        "created_at": int(base.created_at),
        "source": base.source,
        "revision": base.revision,
        "status": base.status,
        "status_details": base.status_details,
        "content_hash": base.content_hash,
        "capabilities": base.capabilities,
        "architecture": base.architecture,
        "num_parameters": base.num_parameters,
        "max_context": base.max_context,
    }


def alias_json(alias: Current) -> Json:
    """One state of an alias; without a target it says when the alias was deleted."""
    revision, targets = alias
    return {
        "id": revision.name,
        "object": "alias",
        "model": targets[0].model_id if targets else None,
        "revision": revision.revision,
        "created_at": int(revision.created_at),
        "created_by": revision.created_by,
    }


def key_json(key: Key) -> Json:
    """A key without its secret."""
    return {
        "id": key.id,
        "object": "api_key",
        "name": key.name,
        "project_id": key.project_id,
        "scopes": key.scopes,
        "redacted_value": f"sk-…{key.hint}",
        "created_at": int(key.created_at),
        "created_by": key.created_by,
        "last_used_at": _seconds(key.last_used_at),
    }
