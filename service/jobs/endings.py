"""How a run ends, and where that leaves its job. Each ending happens once, by the driver or by the orchestrator.

All functions belong in the caller's write transaction, after it proved by an epoch that it may write.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from service.jobs.correction import for_less_memory
from service.jobs.states import Desired, JobKind, JobState
from service.store import checkpoints, events, jobs, runs
from service.store.tables import Job, Run
from training.failure import Failure, out_of_memory

OUT_OF_MEMORY = "out_of_memory"  # the code of training's failure
LIVE = {JobState.RUNNING, JobState.PAUSING}


def stopped(tx: Session, run: Run, *, step: int | None, forced: bool = False) -> bool:
    """The run stopped, or was killed after its grace (`forced`); the job goes where its owner wants it."""
    job = jobs.by_id(tx, run.job_id)
    outcome, state = {
        Desired.CANCEL: ("cancelled", JobState.CANCELLED),
        Desired.PAUSE: ("paused", JobState.PAUSED),
        Desired.RUN: ("requeued", JobState.QUEUED),
    }[Desired(job.desired)]
    if not runs.end(tx, run.id, outcome):
        return False
    job = _leave(tx, job, state)
    where = "" if job.kind == JobKind.SWEEP else f" at step {step if step is not None else last_step(tx, job.id)}"
    text = {
        JobState.CANCELLED: "The job was cancelled",
        JobState.PAUSED: f"The job was paused{where}",
        JobState.QUEUED: f"The run was stopped{where}; the job is back in the queue",
    }[state]
    events.add(tx, job, text + (" (its run did not stop in time and was killed)" if forced else ""))
    return True


def failed(tx: Session, run: Run, *, code: str, message: str, param: str | None = None) -> bool:
    """The run ended with a failure that another attempt would meet again."""
    error = {"code": code, "message": message, "param": param}
    if not runs.end(tx, run.id, "failed", error):
        return False
    job = jobs.by_id(tx, run.job_id)
    if job.desired == Desired.CANCEL:
        events.add(tx, _leave(tx, job, JobState.CANCELLED), "The job was cancelled")
    else:
        fail_job(tx, job, code=code, message=message, param=param)
    return True


def lost(tx: Session, run: Run, *, reason: str, max_attempts: int, lacks_memory: bool = False) -> bool:
    """The run crashed or vanished: the job continues from its last checkpoint, unless it has crashed too often."""
    if not runs.end(tx, run.id, "lost", {"code": "lost", "message": reason, "param": None}):
        return False
    job = jobs.by_id(tx, run.job_id)
    if job.desired == Desired.CANCEL:
        events.add(tx, _leave(tx, job, JobState.CANCELLED), "The job was cancelled")
    elif job.desired == Desired.PAUSE:
        job = _leave(tx, job, JobState.PAUSED)
        events.add(tx, job, f"{reason}; the job was paused and will continue {where_from(tx, job)}", level="warn")
    elif _num_fruitless(tx, run) >= max_attempts:
        message = f"The run crashed {max_attempts} times. Last reason: {reason}"
        failure = out_of_memory() if lacks_memory else Failure("crashed", message)
        fail_job(tx, job, code=failure.code, message=failure.message, param=failure.field_of(job.method))
    else:
        job = _leave(tx, job, JobState.QUEUED)
        events.add(tx, job, f"{reason}; continuing {where_from(tx, job)}", level="warn")
    return True


def fail_job(tx: Session, job: Job, *, code: str, message: str, param: str | None = None) -> Job:
    """End a job as failed, with or without a run; StateConflict if it is no longer in the state of `job`."""
    error: dict[str, Any] = {"code": code, "message": message, "param": param}
    correction = for_less_memory(job) if code == OUT_OF_MEMORY else None
    if correction is not None:
        message += f" The job's own request with {correction.change} is in error.suggested_request, ready to be posted."
        error |= {"message": message, "suggested_request": correction.request}
    expect = {JobState(job.state)}
    job = jobs.move(tx, job.id, JobState.FAILED, expect=expect, error=error, estimated_finish_at=None)
    events.add(tx, job, message, level="error")
    return job


def where_from(tx: Session, job: Job) -> str:
    """What the next run begins with, for event lists."""
    return "with the trials left" if job.kind == JobKind.SWEEP else f"from step {last_step(tx, job.id)}"


def last_step(tx: Session, job_id: str) -> int:
    """The step that the next run starts from."""
    checkpoint = checkpoints.latest(tx, job_id)
    return 0 if checkpoint is None else checkpoint.step


def _leave(tx: Session, job: Job, state: JobState) -> Job:
    return jobs.move(tx, job.id, state, expect=LIVE, stop_requested_at=None, estimated_finish_at=None)


def _num_fruitless(tx: Session, run: Run) -> int:
    """Crashes since the furthest checkpoint was written: a long job may lose many workers as long as it gets on.

    A sweep gets on with each trial that is over."""
    trials = jobs.trials(tx, jobs.by_id(tx, run.job_id))
    if trials:
        return runs.num_lost(tx, run.job_id, since=max(trial.finished_at or 0.0 for trial in trials))
    checkpoint = checkpoints.latest(tx, run.job_id)
    attempts = run.attempt - (0 if checkpoint is None else checkpoint.attempt)
    return min(attempts, runs.num_lost(tx, run.job_id))
