"""Attempts at jobs. A driver proves with each write that its run is still the one that counts."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from service.store.database import new_id, now
from service.store.tables import Run


class RunLost(Exception):
    """The run was ended by somebody else; its driver and workers must stop."""


def start(tx: Session, job_id: str, epoch: int, num_workers: int) -> Run:
    """A new attempt, one higher than the last."""
    attempt = (tx.scalar(select(func.max(Run.attempt)).where(Run.job_id == job_id)) or 0) + 1
    moment = now()
    run = Run(
        id=new_id("run-"),
        created_at=moment,
        job_id=job_id,
        attempt=attempt,
        epoch=epoch,
        num_workers=num_workers,
        state="active",
        heartbeat_at=moment,  # equal until the driver's first own heartbeat
    )
    tx.add(run)
    tx.flush()
    return run


def get(tx: Session, run_id: str) -> Run:
    """The run with this id."""
    return tx.scalars(select(Run).where(Run.id == run_id)).one()


def active(tx: Session) -> list[Run]:
    """Runs that nobody has ended yet."""
    return list(tx.scalars(select(Run).where(Run.state == "active").order_by(Run.seq)))


def last(tx: Session, job_id: str) -> Run | None:
    """The job's newest attempt."""
    return tx.scalar(select(Run).where(Run.job_id == job_id).order_by(Run.attempt.desc()).limit(1))


def num_workers(tx: Session, job_id: str) -> dict[int, int | None]:
    """With how many train workers each attempt was."""
    return {run.attempt: run.num_workers for run in tx.scalars(select(Run).where(Run.job_id == job_id))}


def num_lost(tx: Session, job_id: str, since: float = 0.0) -> int:
    """Attempts that ended in a crash at or after a moment; only these count against the limit of attempts."""
    lost = (Run.job_id == job_id, Run.outcome == "lost", Run.ended_at >= since)
    return tx.scalar(select(func.count()).select_from(Run).where(*lost)) or 0


def hold(tx: Session, run_id: str, epoch: int) -> Run:
    """Prove in this transaction that the run is still active under this epoch, and store the heartbeat."""
    kept = tx.execute(
        update(Run).where(Run.id == run_id, Run.epoch == epoch, Run.state == "active").values(heartbeat_at=now())
    )
    if kept.rowcount == 0:  # type: ignore[attr-defined]
        raise RunLost(f"run {run_id} epoch {epoch} was ended")
    return get(tx, run_id)


def set_first_step(tx: Session, run_id: str, at: float, step: int) -> None:
    """Note when the first optimizer step was done, and after which step the run began."""
    run = get(tx, run_id)
    if run.first_step_at is None:
        run.first_step_at, run.resumed_from = at, step - 1


def end(tx: Session, run_id: str, outcome: str, failure: dict[str, Any] | None = None) -> bool:
    """End a run, once: returns False if it was ended before."""
    ended = tx.execute(
        update(Run)
        .where(Run.id == run_id, Run.state == "active")
        .values(state="ended", outcome=outcome, failure=failure, ended_at=now())
    )
    return bool(ended.rowcount)  # type: ignore[attr-defined]
