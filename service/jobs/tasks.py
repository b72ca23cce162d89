"""Worker tasks: what each kind does, and what is left when it cannot be done. Runs in a worker, never in the tick.

A task may run twice (its worker was lost after the work, before the row said so), so every kind is idempotent.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from service.files import cleanup
from service.files.validation import run_validation
from service.jobs.endings import fail_job
from service.jobs.publish import new_model_id
from service.jobs.run_driver import last_line
from service.jobs.states import JobKind, JobState
from service.jobs.sweeps import Sweep, field_to_change, spec_of_trial
from service.settings import Settings
from service.store import bases, events, files, jobs, tasks
from service.store.database import Database
from service.store.jobs import StateConflict
from service.store.tables import BaseModel, Job, Task
from training.spec import TrainSpec
from training.storage import Storage

log = logging.getLogger(__name__)

LEASE_S = 15.0  # a lost worker's task runs again after this; a living worker prolongs it
MAX_ATTEMPTS = 3
RETRY_DELAY_S = 2.0
SHARED_BY_TRIALS = ("model_id", "capabilities", "num_examples", "num_validation_examples")  # of a plan's numbers
STALE_AFTER_S = 24 * 3600.0  # no upload takes longer


@dataclass(frozen=True)
class Workbench:
    """What a task works with."""

    settings: Settings
    db: Database
    storage: Storage


def validate_file(bench: Workbench, payload: dict[str, Any]) -> None:
    """Read an uploaded file and store its report."""
    run_validation(bench.db, bench.storage, payload["file_id"])


def plan_job(bench: Workbench, payload: dict[str, Any]) -> None:
    """Resolve the job's spec against its data, and queue it; a job that cannot work fails here."""
    from service.jobs.preview import shortages
    from training.plan import PlanError, plan

    with bench.db.read() as tx:
        job = jobs.by_id(tx, payload["job_id"])
        base = bases.find(tx, job.base_id)
    if job.state != JobState.VALIDATING_FILES:
        return  # planned before, or cancelled; a paused job is planned when it is resumed
    spec = TrainSpec.model_validate(job.spec)
    combinations = _combinations(job)
    try:
        on_gpu = bench.settings.train_num_gpus > 0
        made = plan(spec_of_trial(spec, combinations[0]) if combinations else spec, bench.storage, on_gpu=on_gpu)
    except PlanError as error:
        with _moving(bench.db) as tx:
            param = field_to_change(Sweep.model_validate(job.sweep), error.param) if combinations else error.param
            fail_job(tx, job, code=error.code, message=error.message, param=param)
        return
    lacking = shortages(bench.settings, bench.storage, made)
    numbers = {
        **made.model_dump(mode="json", exclude={"spec"}),
        "model_id": new_model_id(job.base_id, bench.settings.organization, job.suffix),
        "num_gpus_per_worker": bench.settings.train_num_gpus,
        "capabilities": _capabilities(made.spec, base),
    }
    resolved = made.spec.model_dump(mode="json")
    if combinations:  # each trial is planned by itself
        resolved, numbers = job.spec, {name: numbers[name] for name in SHARED_BY_TRIALS} | {"trials": combinations}
    with _moving(bench.db) as tx:
        expect = {JobState.VALIDATING_FILES}
        moved = jobs.move(tx, job.id, JobState.QUEUED, expect=expect, spec=resolved, plan=numbers)
        for number, warning in enumerate([*made.warnings, *lacking]):
            events.add(tx, moved, warning, level="warn", dedup_key=f"{job.id}:plan-{number}")
        events.add(tx, moved, "Files validated, moving job to queued state", dedup_key=f"{job.id}:queued")


def _capabilities(spec: TrainSpec, base: BaseModel | None) -> list[str]:
    """What the model will do: a classifier names labels, any other model does what its base does."""
    if spec.method == "classification":
        return ["classify"]
    return [] if base is None else list(base.capabilities)


def preview_job(bench: Workbench, payload: dict[str, Any]) -> dict[str, Any]:
    """Plan what nobody has asked to run yet, for a request that waits for the answer."""
    from service.jobs.preview import preview

    spec = TrainSpec.model_validate(payload["spec"])
    return preview(bench.settings, bench.db, bench.storage, spec, payload["project_id"])


def _combinations(job: Job) -> list[dict[str, float | int]]:
    """What a sweep tries; nothing for other jobs."""
    if job.kind != JobKind.SWEEP:
        return []
    from service.jobs import ray_tune

    return ray_tune.draw_combinations(Sweep.model_validate(job.sweep), int(job.spec["seed"]))


def warm_up() -> None:
    """Import what planning needs, so that the first job of a process does not wait for it."""
    from training import plan  # noqa: F401


def import_base(bench: Workbench, payload: dict[str, Any]) -> None:
    """Copy a base into storage, or build the starter, and make it usable."""
    from training import bases as importer

    with bench.db.read() as tx:
        base = bases.find(tx, payload["base_id"])
    if base is None or base.status != "preparing":
        return

    def show(text: str) -> None:
        with bench.db.write() as tx:
            if bases.is_preparing(tx, base):
                bases.set_status(tx, base.id, "preparing", text)

    try:
        found = importer.import_base(
            bench.storage, id=base.id, source=base.source, revision=base.revision, progress=show
        )
    except importer.BaseError as error:
        with bench.db.write() as tx:
            if bases.is_preparing(tx, base):
                bases.set_status(tx, base.id, "error", str(error))
        return
    with bench.db.write() as tx:
        if bases.is_preparing(tx, base):
            bases.set_ready(tx, base.id, **found.model_dump(mode="json"))


def delete_folder(bench: Workbench, payload: dict[str, Any]) -> None:
    """Remove bytes whose row is gone."""
    bench.storage.delete(payload["key"])


def clean_files(bench: Workbench, payload: dict[str, Any]) -> None:
    """Remove what killed uploads left behind, and files whose time is over."""
    cleanup.sweep_incoming(bench.storage, STALE_AFTER_S)
    cleanup.sweep_orphans(bench.db, bench.storage, STALE_AFTER_S)
    cleanup.expire_files(bench.db)
    with bench.db.write() as tx:
        tasks.drop_old(tx, "preview_job", STALE_AFTER_S)


# What a handler returns is the answer to whoever waits for the task.
HANDLERS: dict[str, Callable[[Workbench, dict[str, Any]], dict[str, Any] | None]] = {
    "validate_file": validate_file,
    "plan_job": plan_job,
    "preview_job": preview_job,
    "import_base": import_base,
    "delete_folder": delete_folder,
    "clean_files": clean_files,
}


def execute(bench: Workbench, task: Task) -> None:
    """Do a claimed task and store how it went. Never raises: a failure is retried later, or given up."""
    try:
        with _lease(bench.db, task.id):
            answer = HANDLERS[task.kind](bench, task.payload)
    except Exception as error:  # process edge: the task is kept and runs again
        log.exception("task %s (%s) failed", task.id, task.kind)
        with bench.db.write() as tx:
            retry_or_give_up(tx, task, last_line(error))
    else:
        with bench.db.write() as tx:
            tasks.finish(tx, task.id, answer)


def retry_or_give_up(tx: Session, task: Task, reason: str) -> None:
    """Queue a failed task again; after too many attempts mark what it was for as failed."""
    if not tasks.retry(tx, task.id, reason, RETRY_DELAY_S * task.attempt, MAX_ATTEMPTS):
        _GIVE_UP[task.kind](tx, task.payload, reason)


def _file_failed(tx: Session, payload: dict[str, Any], reason: str) -> None:
    file = files.by_id(tx, payload["file_id"])
    if file is not None and file.status == "uploaded":
        details = f"the file could not be validated: {reason}"
        files.set_validated(tx, file.id, status="error", details=details, report=None)


def _plan_failed(tx: Session, payload: dict[str, Any], reason: str) -> None:
    job = jobs.by_id(tx, payload["job_id"])
    if job.state == JobState.VALIDATING_FILES:
        fail_job(tx, job, code="planning_failed", message=f"The job could not be planned: {reason}")


def _base_failed(tx: Session, payload: dict[str, Any], reason: str) -> None:
    base = bases.find(tx, payload["base_id"])
    if base is not None and base.status == "preparing":
        bases.set_status(tx, base.id, "error", reason)


def _nothing(tx: Session, payload: dict[str, Any], reason: str) -> None:
    """Bytes that could not be deleted harm nobody, and who waits for a preview reads the row; the log has said it."""


_GIVE_UP: dict[str, Callable[[Session, dict[str, Any], str], None]] = {
    "validate_file": _file_failed,
    "plan_job": _plan_failed,
    "preview_job": _nothing,
    "import_base": _base_failed,
    "delete_folder": _nothing,
    "clean_files": _nothing,
}


@contextmanager
def _moving(db: Database) -> Iterator[Session]:
    """A transaction that moves a job, unless its owner moved it meanwhile: then nothing happens."""
    try:
        with db.write() as tx:
            yield tx
    except StateConflict as conflict:
        log.info("%s", conflict)


@contextmanager
def _lease(db: Database, task_id: str) -> Iterator[None]:
    """Prolong the task's lease from a side thread while it works."""
    done = threading.Event()

    def prolong() -> None:
        while not done.wait(LEASE_S / 3):
            try:
                with db.write() as tx:
                    tasks.extend(tx, task_id, LEASE_S)
            except Exception:  # thread edge: a database that is away for a moment must not end the task
                log.exception("lease of task %s", task_id)

    thread = threading.Thread(target=prolong, name=f"lease-{task_id}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
