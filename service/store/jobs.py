"""Fine-tuning jobs: rows, moves by compare-and-swap, and the users' wishes."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.orm import Session

from service.errors import InvalidRequest, NotFound
from service.jobs.states import Desired, JobKind, JobState, check_move
from service.store import events
from service.store.database import new_id, now
from service.store.tables import Job, Outbox


class StateConflict(Exception):
    """The job was moved by somebody else in between."""


def create(tx: Session, *, kind: JobKind = JobKind.FINE_TUNING, **fields: Any) -> Job:
    """A new job, waiting for its files."""
    job = Job(
        id=new_id("ftjob-"),
        created_at=now(),
        kind=kind,
        state=JobState.VALIDATING_FILES,
        desired=Desired.RUN,
        state_version=0,
        result_file_ids=[],
        **fields,
    )
    tx.add(job)
    tx.flush()
    _announce(tx, job)
    return job


def in_project(project_id: str, metadata: dict[str, str] | None = None) -> list[ColumnElement[bool]]:
    """Conditions of the job list of a project; every given metadata pair must match."""
    where = [Job.project_id == project_id]
    for name, value in (metadata or {}).items():
        where.append(Job.user_metadata[name].as_string() == value)
    return where


def of_parent(sweep_id: str | None) -> ColumnElement[bool]:
    """Condition for the trials of a sweep; with None for the jobs that are nobody's trial."""
    return Job.parent_job_id.is_(None) if sweep_id is None else Job.parent_job_id == sweep_id


def without_metadata() -> ColumnElement[bool]:
    """Condition for jobs that have no metadata."""
    return Job.user_metadata.is_(None)


def get(tx: Session, project_id: str, job_id: str) -> Job:
    """The project's job."""
    job = tx.scalar(select(Job).where(Job.id == job_id, Job.project_id == project_id))
    if job is None:
        raise NotFound(f"Could not find fine tune: {job_id}", param="fine_tuning_job_id", code="fine_tune_not_found")
    return job


def by_id(tx: Session, job_id: str) -> Job:
    """A job of any project; for workers."""
    return tx.scalars(select(Job).where(Job.id == job_id)).one()


def find_retried(tx: Session, request_hash: str, window_s: float) -> Job | None:
    """The newest job of the same key and body within the window."""
    return tx.scalar(
        select(Job)
        .where(Job.request_hash == request_hash, Job.created_at > now() - window_s)
        .order_by(Job.seq.desc())
        .limit(1)
    )


def trials(tx: Session, *among: Job) -> list[Job]:
    """The trials of the sweeps that are among the jobs, by number; nothing is asked where there are none."""
    sweep_ids = [job.id for job in among if job.kind == JobKind.SWEEP]
    if not sweep_ids:
        return []
    return list(tx.scalars(select(Job).where(Job.parent_job_id.in_(sweep_ids)).order_by(Job.trial_number)))


def open_with_file(tx: Session, file_id: str) -> Job | None:
    """An unfinished job that needs the file."""
    uses = (Job.training_file_id == file_id) | (Job.validation_file_id == file_id)
    return tx.scalar(select(Job).where(uses, Job.finished_at.is_(None)).limit(1))


def in_state(tx: Session, *states: JobState) -> list[Job]:
    """Jobs in any of the states, in the order in which they are served."""
    return list(tx.scalars(select(Job).where(Job.state.in_(states)).order_by(Job.priority.desc(), Job.seq)))


def any_open(tx: Session) -> bool:
    """Whether any job is not over for good."""
    states = [state for state in JobState if not state.is_terminal]
    return tx.scalar(select(Job.id).where(Job.state.in_(states)).limit(1)) is not None


def newest_succeeded(tx: Session, base_id: str, method: str, limit: int) -> list[Job]:
    """The last finished jobs of any project that trained this base by this method."""
    where = (Job.base_id == base_id, Job.method == method, Job.state == JobState.SUCCEEDED)
    return list(tx.scalars(select(Job).where(*where).order_by(Job.seq.desc()).limit(limit)))


def count_by_state(tx: Session) -> dict[str, int]:
    """Number of jobs per state, states without jobs left out."""
    rows = tx.execute(select(Job.state, func.count()).group_by(Job.state))
    return {state: num for state, num in rows}  # noqa: C416 - rows are not pairs to a type checker


def move(tx: Session, job_id: str, new: JobState, *, expect: set[JobState] | None = None, **changes: Any) -> Job:
    """Change the state by compare-and-swap, and announce it in the same transaction. A sweep that is over takes its
    trials along.

    StateConflict if the job is not in one of `expect` (default: any state that may move to `new`).
    """
    job = by_id(tx, job_id)
    old = JobState(job.state)
    if expect is not None and old not in expect:
        raise StateConflict(f"job {job_id} is {old}, not {' or '.join(sorted(expect))}")
    check_move(old, new)
    if new.is_terminal:
        changes.setdefault("finished_at", now())
    _swap(tx, job, state=new, **changes)
    _announce(tx, job)
    if new.is_terminal:
        pass_wish_on(tx, job, Desired.CANCEL)
    return job


def _swap(tx: Session, job: Job, **changes: Any) -> None:
    """Change the job if nobody did since it was read. States and wishes go this way: each is chosen by the other."""
    swapped = tx.execute(
        update(Job)
        .where(Job.id == job.id, Job.state_version == job.state_version)
        .values(state_version=job.state_version + 1, **changes)
    )
    if swapped.rowcount == 0:  # type: ignore[attr-defined]
        raise StateConflict(f"job {job.id} was changed since it was {job.state}")
    tx.refresh(job)


def change(tx: Session, job_id: str, **changes: Any) -> None:
    """Change columns that no move depends on."""
    assert not changes.keys() & {"state", "desired"}
    tx.execute(update(Job).where(Job.id == job_id).values(**changes))


def _announce(tx: Session, job: Job) -> None:
    tx.add(
        Outbox(
            project_id=job.project_id,
            type=f"fine_tuning.job.{job.state}",
            object_id=job.id,
            data={"state_version": job.state_version},
            created_at=now(),
        )
    )
    tx.flush()


def request_cancel(tx: Session, project_id: str, job_id: str) -> Job:
    """Cancel: at once without a live run, otherwise as a wish that the run obeys at its next step."""
    job = get(tx, project_id, job_id)
    state = JobState(job.state)
    if state.is_terminal:
        raise InvalidRequest(f"The job is {state} already and cannot be cancelled.", code="invalid_job_state")
    if not state.has_live_run:
        job = move(tx, job.id, JobState.CANCELLED, expect={state}, desired=Desired.CANCEL)
        events.add(tx, job, "The job was cancelled")
        return job
    if job.desired != Desired.CANCEL:
        _swap(tx, job, desired=Desired.CANCEL, stop_requested_at=now())
        events.add(tx, job, f"Cancelling: {_who_stops(job)} after the current step")
        pass_wish_on(tx, job, Desired.CANCEL)
    return job


def request_pause(tx: Session, project_id: str, job_id: str) -> Job:
    """Pause: at once without a live run, otherwise after a checkpoint of the current step."""
    job = get(tx, project_id, job_id)
    state = JobState(job.state)
    if state in (JobState.PAUSING, JobState.PAUSED) and job.desired == Desired.PAUSE:
        return job
    if state.is_terminal or job.desired == Desired.CANCEL:
        what = f"is {state} already" if state.is_terminal else "is being cancelled"
        raise InvalidRequest(f"The job {what} and cannot be paused.", code="invalid_job_state")
    if not state.has_live_run:
        job = move(tx, job.id, JobState.PAUSED, expect={state}, desired=Desired.PAUSE)
        events.add(tx, job, "The job was paused")
    else:
        job = move(tx, job.id, JobState.PAUSING, expect={state}, desired=Desired.PAUSE, stop_requested_at=now())
        events.add(tx, job, f"Pausing: {_who_stops(job)} with a checkpoint after the current step")
    pass_wish_on(tx, job, Desired.PAUSE)
    return job


def request_resume(tx: Session, project_id: str, job_id: str) -> Job:
    """Resume a paused job, or take back a pause that has not happened yet."""
    job = get(tx, project_id, job_id)
    state = JobState(job.state)
    if state == JobState.PAUSED:
        back = JobState.VALIDATING_FILES if job.plan is None else JobState.QUEUED
        job = move(tx, job.id, back, expect={state}, desired=Desired.RUN, stop_requested_at=None)
    elif state == JobState.PAUSING and job.desired == Desired.PAUSE:
        job = move(tx, job.id, JobState.RUNNING, expect={state}, desired=Desired.RUN, stop_requested_at=None)
    else:
        raise InvalidRequest(f"The job is {state}; only a paused job can be resumed.", code="invalid_job_state")
    events.add(tx, job, "The job was resumed")
    pass_wish_on(tx, job, Desired.RUN)
    return job


def pass_wish_on(tx: Session, sweep: Job, wish: Desired) -> None:
    """Have the trials that are not over do what is wanted of their sweep; for other jobs nothing.

    A trial that is cancelled for itself stays so; one that was paused for itself goes on when its sweep is resumed.
    """
    request = {Desired.CANCEL: request_cancel, Desired.PAUSE: request_pause, Desired.RUN: request_resume}[wish]
    for trial in trials(tx, sweep):
        if not JobState(trial.state).is_terminal and trial.desired not in (wish, Desired.CANCEL):
            request(tx, trial.project_id, trial.id)


def _who_stops(job: Job) -> str:
    return "its trials stop" if job.kind == JobKind.SWEEP else "the run stops"
