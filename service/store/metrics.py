"""Numbers per step. A later attempt repeats steps after its checkpoint; readers see one curve, the latest attempt's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from service.store.tables import Metric


def add(tx: Session, job_id: str, attempt: int, kind: str, step: int, data: dict[str, Any], at: float) -> None:
    """Store one step's numbers; a repeated delivery is a no-op. `kind` is "step" or "eval"."""
    if tx.get(Metric, (job_id, step, kind, attempt)) is None:
        tx.add(Metric(job_id=job_id, step=step, kind=kind, attempt=attempt, data=data, at=at))
        tx.flush()


def merged(tx: Session, job_id: str, kind: str | None = None) -> list[Metric]:
    """One row per step and kind, by step. Where an attempt trained again from step s, older attempts end before s."""
    rows = list(tx.scalars(select(Metric).where(Metric.job_id == job_id).order_by(Metric.step, Metric.attempt)))
    first_step: dict[int, int] = {}  # attempt -> its first trained step
    for row in rows:
        if row.kind == "step":
            first_step[row.attempt] = min(row.step, first_step.get(row.attempt, row.step))

    def is_superseded(row: Metric) -> bool:
        return any(attempt > row.attempt and row.step >= first for attempt, first in first_step.items())

    winners: dict[tuple[int, str], Metric] = {}
    for row in rows:
        if not is_superseded(row) and (kind is None or row.kind == kind):
            winners[row.step, row.kind] = row
    return [winners[key] for key in sorted(winners)]


def evaluations(tx: Session, job_ids: Iterable[str]) -> list[Metric]:
    """Every evaluation of the jobs, in the order in which they were made; steps that were trained again come again."""
    chosen = select(Metric).where(Metric.job_id.in_(list(job_ids)), Metric.kind == "eval")
    return list(tx.scalars(chosen.order_by(Metric.at, Metric.job_id, Metric.step)))


def trained_tokens(tx: Session, job_id: str) -> int:
    """Tokens with a loss that the job's curve stands for; repeated steps count once."""
    return sum(row.data["num_trained_tokens"] for row in merged(tx, job_id, "step"))


def of_attempt(tx: Session, job_id: str, attempt: int, after: Mapping[str, int], limit: int) -> list[Metric]:
    """The attempt's next rows in the order in which they were stored; `after` holds the last step of each kind."""
    is_new = or_(*((Metric.kind == kind) & (Metric.step > step) for kind, step in after.items()))
    of_run = select(Metric).where(Metric.job_id == job_id, Metric.attempt == attempt, is_new)
    return list(tx.scalars(of_run.order_by(Metric.step, Metric.kind.desc()).limit(limit)))  # "step" before "eval"
