"""What a job would be, before there is one: its plan with time, disk and where the model would answer.

Runs in a worker task, because planning renders every row, and trying out the base's speed takes seconds.
"""

from __future__ import annotations

import os
import shutil
import time
from typing import TYPE_CHECKING, Any

from service.engine.support import why_no_adapter
from service.settings import Settings
from service.store import bases, jobs, metrics, runs
from service.store.database import Database
from service.store.tables import Job
from training.spec import AUTO, TrainSpec
from training.storage import Storage

if TYPE_CHECKING:
    from training.plan import Plan

MIN_STEPS = 5  # of an earlier job, before its speed says something
NUM_EARLIER_JOBS = 20
MARGIN_S = 10.0  # of the time that a request waits: a plan without a duration is better than none

Json = dict[str, Any]


def preview(settings: Settings, db: Database, storage: Storage, spec: TrainSpec, project_id: str) -> Json:
    """`{"plan": …}`, or `{"error": …}` with the code, message and param that the job would end with. Of jobs of other
    projects than the caller's nothing but their speed is used."""
    from training import estimate
    from training.model_shape import ModelShape
    from training.plan import PlanError, plan

    started = time.perf_counter()
    try:
        made = plan(spec, storage, on_gpu=settings.train_num_gpus > 0)
    except PlanError as error:
        return {"error": {"code": error.code, "message": error.message, "param": error.param}}
    render_s = time.perf_counter() - started
    patience_s = max(1.0, settings.validate_timeout_s - MARGIN_S - render_s)
    rate, basis = _tokens_per_s(settings, db, storage, made, project_id, patience_s)
    shape = ModelShape(storage.local_folder(spec.base.key))
    free_bytes = _free_bytes(storage)
    num_kept, num_bytes = estimate.num_kept_checkpoints(made), estimate.disk_bytes(made)
    return {
        "plan": {
            **made.model_dump(mode="json"),
            "duration_s": None if rate is None else round(estimate.duration_s(made, shape, rate, render_s), 1),
            "time_basis": basis,
            "disk": {
                "checkpoint_bytes": made.checkpoint_bytes,
                "num_kept_checkpoints": num_kept,
                "artifact_bytes": made.artifact_bytes,
                "total_bytes": num_bytes,
                "free_bytes": free_bytes,
            },
            "warnings": [*made.warnings, *shortages(settings, storage, made)],
            "serving": _serving(settings, db, spec, shape.config),
        }
    }


def shortages(settings: Settings, storage: Storage, made: Plan) -> list[str]:
    """What this machine does not have, as far as the run must be here."""
    from training.estimate import disk_bytes as left_by

    found, disk_bytes, free_bytes = [], left_by(made), _free_bytes(storage)
    if free_bytes is not None and disk_bytes > free_bytes:
        found.append(f"The run leaves {_gb(disk_bytes)} in storage, and {_gb(free_bytes)} are free.")
    needed, memory = made.peak_memory_bytes * made.spec.num_workers, _machine_memory()
    if settings.is_single_node and not settings.train_num_gpus and needed > memory:
        found.append(f"The run needs about {_gb(needed)} of memory, and this machine has {_gb(memory)}.")
    return found


def _free_bytes(storage: Storage) -> int | None:
    """On the disk of the storage; None where that is no disk of this machine."""
    return shutil.disk_usage(storage.path("x").rpartition("/")[0]).free if storage.is_local else None


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"


# -- speed -------------------------------------------------------------------------------------------------------------


def _tokens_per_s(
    settings: Settings, db: Database, storage: Storage, made: Plan, project_id: str, patience_s: float
) -> tuple[float | None, str]:
    """What one worker trains, and how that is known: from an earlier job, or tried out now; None when it is not."""
    from training.probe import ProbeError, tokens_per_s

    earlier = _of_earlier_job(settings, db, made.spec)
    if earlier is not None:
        job, speed = earlier
        name = f"job {job.id}" if job.project_id == project_id else "an earlier job"  # of other projects only the speed
        return speed, f"the speed of {name}, on the same base in the same way"
    if settings.train_num_gpus:
        return None, "unknown: no job of this kind has run here yet, and planning takes no GPU to try it"
    num_threads = settings.train_num_threads or max(1, len(os.sched_getaffinity(0)) // made.spec.num_workers)
    mean_tokens = made.num_tokens / made.num_examples
    try:
        speed = tokens_per_s(made.spec, storage, mean_tokens, num_threads=num_threads, patience_s=patience_s)
    except ProbeError as error:
        return None, f"unknown: {error}"
    return speed, "some steps over the first layers of the base and the first rows, tried on this machine"


def _of_earlier_job(settings: Settings, db: Database, spec: TrainSpec) -> tuple[Job, float] | None:
    """The newest finished job that trained the same base in the same way, and its tokens per second and worker."""
    with db.read() as tx:
        for job in jobs.newest_succeeded(tx, spec.base.id, spec.method, NUM_EARLIER_JOBS):
            done, numbers = TrainSpec.model_validate(job.spec), job.plan or {}
            if _kind(done) != _kind(spec) or numbers.get("num_gpus_per_worker") != settings.train_num_gpus:
                continue
            steps = metrics.merged(tx, job.id, "step")[1:]  # the first one warms up
            workers = runs.num_workers(tx, job.id)  # an elastic job has had fewer in some attempts
            seconds = sum(  # of all workers together
                (workers.get(step.attempt) or done.num_workers)
                * step.data["num_trained_tokens"]
                / step.data["tokens_per_s"]
                for step in steps
                if step.data["tokens_per_s"]
            )
            n_epochs = done.hyperparameters.n_epochs
            if len(steps) < MIN_STEPS or not seconds or n_epochs == AUTO:
                continue
            num_tokens = n_epochs * numbers["num_tokens"] * len(steps) / numbers["total_steps"]
            return job, num_tokens / seconds
    return None


def _kind(spec: TrainSpec) -> tuple[object, ...]:
    """What the speed of a run depends on beside its base, method and device."""
    return spec.base.content_hash, spec.adapter is None, spec.precision, spec.num_workers, spec.parallel


# -- serving -----------------------------------------------------------------------------------------------------------


def _serving(settings: Settings, db: Database, spec: TrainSpec, config: Json) -> Json:
    """Whether the model would answer here, and which deployment it would join."""
    with db.read() as tx:
        base = bases.find(tx, spec.base.id)
    is_encoder = spec.method in ("classification", "embedding")
    reason = _why_not(settings, [] if base is None else base.capabilities)
    if reason is None and spec.adapter is not None and not is_encoder:
        reason = why_no_adapter(config)
    if reason is not None:
        return {"can_be_served": False, "deployment": None, "reason": reason}
    if is_encoder or spec.adapter is None:
        return {"can_be_served": True, "deployment": "its own", "reason": "the model gets a deployment of its own"}
    return {"can_be_served": True, "deployment": spec.base.id, "reason": "the adapter joins the replicas of its base"}


def _why_not(settings: Settings, capabilities: list[str]) -> str | None:
    if settings.engine == "echo":
        return "this service answers with the echo engine, which runs no model"
    if not capabilities:
        return "the base has no capability that is served"
    return None
