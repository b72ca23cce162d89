"""What a job waits for before it is planned: its files, validated."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy.orm import Session

from service.store import files
from service.store.tables import File, Job

NUM_NAMED_LINES = 10


@dataclass(frozen=True)
class Problem:
    """Why a job cannot work, in OpenAI's error fields."""

    code: str
    message: str
    param: str


def is_ready_to_plan(tx: Session, job: Job) -> bool:
    """Whether every file of the job is validated and good."""
    return all(file is not None and file.status == "processed" for _param, file in _files(tx, job))


def find_problem(tx: Session, job: Job) -> Problem | None:
    """The first file of the job that can never be used."""
    for param, file in _files(tx, job):
        what = param.replace("_", " ")
        code = f"invalid_{param}"
        if file is None or file.deleted_at is not None:
            return Problem(code, f"The job failed because its {what} was deleted.", param)
        if file.status == "error":
            return Problem(code, f"The job failed due to an invalid {what}. {_faults(file)}", param)
    return None


def _files(tx: Session, job: Job) -> list[tuple[str, File | None]]:
    found = [("training_file", files.by_id(tx, job.training_file_id))]
    if job.validation_file_id is not None:
        found.append(("validation_file", files.by_id(tx, job.validation_file_id)))
    return found


def _faults(file: File) -> str:
    """The first faulty lines, or the file's own words when it has no lines to blame."""
    report = file.report or {}
    faults = report.get("errors") or []
    if not faults:
        return f"{file.id}: {file.status_details or 'it could not be read'}"
    named = "; ".join(f"line {fault['line']}: {fault['message']}" for fault in faults[:NUM_NAMED_LINES])
    num_more = report["num_faults"] - len(faults[:NUM_NAMED_LINES])
    return f"{file.id}: {named}" + (f"; and {num_more} more" if num_more else "")
