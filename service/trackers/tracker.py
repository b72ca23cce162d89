"""What a tracker is.

Each is a small class over its maker's library, which is imported when a run begins and never before: gateways need
none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from service.store.tables import Job, Metric

CONSTANTS = {"total_steps"}  # the same in every row
PLACES = {"base", "start", "training_key", "validation_key"}  # in our storage; their ids say more
TEXTS = {"sample_prompts", "labels", "label_counts"}  # a user's own words stay here


class Tracker(Protocol):
    """A job's curve elsewhere. Called by one thread; whatever a method raises is told to the user and tried again."""

    key: str  # of the integration, also in `tunesmith[key]`
    name: str  # as its makers write it

    def open(self, job: Job) -> str | None:
        """Begin the job's curve, or go on with the one that an earlier attempt began. Returns where to look at it."""
        ...

    def log(self, rows: Sequence[Metric]) -> None:
        """The next rows, by step. After `open` they come from the job's first step on, those of earlier attempts
        included: what is there already must not be there twice."""
        ...

    def close(self, job: Job) -> None:
        """The attempt is over, and `job` is in the state that it left it in; returns when everything is delivered."""
        ...


def numbers(row: Metric) -> dict[str, float]:
    """The values of a row that can be drawn, under OpenAI's names, and a method's own, such as rewards."""
    return {
        name: float(value)
        for name, value in (row.data | row.data.get("means", {})).items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in CONSTANTS
    }


def settings_of(job: Job) -> dict[str, Any]:
    """What the job was asked to do, the numbers that 'auto' became included, by dotted name."""
    spec = {name: value for name, value in _flat(job.spec) if PLACES.union(TEXTS).isdisjoint(name.split("."))}
    files = {"training_file": job.training_file_id, "validation_file": job.validation_file_id}
    start = {"start": job.parent_model_id} if job.parent_model_id else {}
    return {"job_id": job.id, "base": job.base_id, **start, **files, **spec}


def outcome_of(job: Job) -> dict[str, str]:
    """What the attempt led to."""
    return {"status": job.state} | ({"fine_tuned_model": job.fine_tuned_model} if job.fine_tuned_model else {})


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
