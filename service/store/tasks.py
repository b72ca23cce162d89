"""Work for worker tasks: claimed under a lease, run again when the lease runs out, so each task must be idempotent."""

from __future__ import annotations

from typing import Any

from sqlalchemy import and_, delete, func, or_, select
from sqlalchemy.orm import Session

from service.store.database import new_id, now
from service.store.tables import Task


def add(tx: Session, kind: str, payload: dict[str, Any]) -> Task:
    """Queue a task."""
    task = Task(
        id=new_id("task-"), created_at=now(), kind=kind, payload=payload, state="queued", attempt=0, not_before=0.0
    )
    tx.add(task)
    tx.flush()
    return task


def claim(tx: Session, limit: int, lease_s: float) -> list[Task]:
    """Take the oldest tasks that are due, those of a dead worker included."""
    moment = now()
    due = or_(
        and_(Task.state == "queued", Task.not_before <= moment),
        and_(Task.state == "leased", Task.lease_until < moment),
    )
    tasks = list(tx.scalars(select(Task).where(due).order_by(Task.seq).limit(limit).with_for_update(skip_locked=True)))
    for task in tasks:
        task.state, task.attempt, task.lease_until = "leased", task.attempt + 1, moment + lease_s
    tx.flush()
    return tasks


def get(tx: Session, task_id: str) -> Task:
    """The task with this id."""
    return tx.scalars(select(Task).where(Task.id == task_id)).one()


def extend(tx: Session, task_id: str, lease_s: float) -> None:
    """Prolong the lease of a task that still works."""
    get(tx, task_id).lease_until = now() + lease_s


def finish(tx: Session, task_id: str, answer: dict[str, Any] | None = None) -> None:
    """The task is done; `answer` is for whoever waits for it."""
    task = get(tx, task_id)
    task.state, task.lease_until, task.error, task.answer = "done", None, None, answer


def retry(tx: Session, task_id: str, error: str, delay_s: float, max_attempts: int) -> bool:
    """Queue a failed task again, or give up after `max_attempts`; returns whether it will run again."""
    task = get(tx, task_id)
    task.error, task.lease_until = error, None
    task.state = "failed" if task.attempt >= max_attempts else "queued"
    task.not_before = now() + delay_s
    return task.state == "queued"


def num_open(tx: Session, kind: str | None = None) -> int:
    """Tasks, of one kind or of all, that are queued or being worked on."""
    where = [Task.state.in_(("queued", "leased")), *([] if kind is None else [Task.kind == kind])]
    return tx.scalar(select(func.count()).select_from(Task).where(*where)) or 0


def drop(tx: Session, task_id: str) -> None:
    """Forget a task whose answer was taken, or which nobody waits for any more; one being worked on stays."""
    tx.execute(delete(Task).where(Task.id == task_id, Task.state != "leased"))


def drop_old(tx: Session, kind: str, age_s: float) -> None:
    """Forget tasks of a kind that ended, and whose answers nobody took."""
    ended = Task.state.in_(("done", "failed"))
    tx.execute(delete(Task).where(Task.kind == kind, ended, Task.created_at < now() - age_s))


def has_open(tx: Session, kind: str, payload: dict[str, Any]) -> bool:
    """Whether the same task is already queued or being worked on."""
    rows = tx.scalars(select(Task).where(Task.kind == kind, Task.state.in_(("queued", "leased"))))
    return any(task.payload == payload for task in rows)
