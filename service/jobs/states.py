"""The kinds and states of a job and the moves between them. Pure: no SQL, no Ray, no clock."""

from __future__ import annotations

from enum import StrEnum


class JobKind(StrEnum):
    """What a job does: train one model, or search for the best of several."""

    FINE_TUNING = "fine_tuning"
    SWEEP = "sweep"


class JobState(StrEnum):
    """Where a job is. `pausing` and `paused` extend OpenAI's set."""

    VALIDATING_FILES = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        """Whether the job is over for good."""
        return not MOVES[self]

    @property
    def has_live_run(self) -> bool:
        """Whether a run may be working in this state."""
        return self in (JobState.RUNNING, JobState.PAUSING)


class Desired(StrEnum):
    """Where its owner wants a job."""

    RUN = "run"
    PAUSE = "pause"
    CANCEL = "cancel"


_S = JobState
MOVES: dict[JobState, frozenset[JobState]] = {
    _S.VALIDATING_FILES: frozenset({_S.QUEUED, _S.PAUSED, _S.FAILED, _S.CANCELLED}),
    _S.QUEUED: frozenset({_S.RUNNING, _S.PAUSED, _S.FAILED, _S.CANCELLED}),
    # A stopped or lost run goes back to the queue; a run that finishes while a pause is asked for has succeeded.
    _S.RUNNING: frozenset({_S.QUEUED, _S.PAUSING, _S.PAUSED, _S.SUCCEEDED, _S.FAILED, _S.CANCELLED}),
    _S.PAUSING: frozenset({_S.RUNNING, _S.QUEUED, _S.PAUSED, _S.SUCCEEDED, _S.FAILED, _S.CANCELLED}),
    _S.PAUSED: frozenset({_S.QUEUED, _S.VALIDATING_FILES, _S.CANCELLED}),
    _S.SUCCEEDED: frozenset(),
    _S.FAILED: frozenset(),
    _S.CANCELLED: frozenset(),
}


def check_move(old: JobState, new: JobState) -> None:
    """AssertionError on a move that the table does not have: that would be our own mistake."""
    assert new in MOVES[old], f"illegal job move {old} -> {new}"
