"""The validation report of a training file: every line looked at, the first faults kept with their line numbers.

Whether a file has enough records for a job is the job's question; this only counts them.
"""

from __future__ import annotations

import hashlib
from typing import IO

from service.store import files
from service.store.database import Database
from training.records import Record, RecordError, RecordKind, iter_records, kind_of
from training.spec import Contract
from training.storage import Storage

MAX_LISTED = 50  # faults and duplicates named in a report; all are counted
MAX_DETAILS = 500  # characters of `status_details`
VALIDATED_PURPOSE = "fine-tune"


class LineFault(Contract):
    """A line that cannot be used, and how to mend it."""

    line: int
    message: str


class Report(Contract):
    """What a file holds. It can be used if it has records and no faults."""

    kind: RecordKind | None = None
    num_records: int = 0
    num_faults: int = 0
    errors: tuple[LineFault, ...] = ()  # the first ones
    num_duplicates: int = 0
    duplicate_lines: tuple[int, ...] = ()  # lines that repeat an earlier record exactly
    warnings: tuple[str, ...] = ()

    @property
    def is_valid(self) -> bool:
        """Whether a job may use the file."""
        return self.num_records > 0 and self.num_faults == 0

    def details(self) -> str | None:
        """Why the file cannot be used, in one short sentence for `status_details`; None if it can."""
        if self.num_faults:
            count = "1 line is invalid" if self.num_faults == 1 else f"{self.num_faults} lines are invalid"
            first = self.errors[0]
            return _cut(f"{count}; line {first.line}: {first.message}")
        return None if self.num_records else "the file holds no records, only blank lines"


def validate(file: IO[bytes]) -> Report:
    """Read a JSONL file line by line; memory grows only with 16 bytes per record, to find duplicates."""
    kind: RecordKind | None = None
    faults: list[LineFault] = []
    duplicates: list[int] = []
    num_records = num_faults = num_duplicates = 0
    seen: set[bytes] = set()
    for number, found in iter_records(file):
        if isinstance(found, RecordError):
            num_faults += 1
            if len(faults) < MAX_LISTED:
                faults.append(LineFault(line=number, message=found.message))
            continue
        num_records += 1
        kind = kind or kind_of(found)
        digest = _digest(found)
        if digest in seen:
            num_duplicates += 1
            if len(duplicates) < MAX_LISTED:
                duplicates.append(number)
        seen.add(digest)
    return Report(
        kind=kind,
        num_records=num_records,
        num_faults=num_faults,
        errors=tuple(faults),
        num_duplicates=num_duplicates,
        duplicate_lines=tuple(duplicates),
        warnings=_warnings(num_duplicates, duplicates),
    )


def run_validation(db: Database, storage: Storage, file_id: str) -> None:
    """Validate an uploaded file and store the outcome; safe to run again, and after the file was deleted."""
    with db.read() as tx:
        row = files.by_id(tx, file_id)
    if row is None or row.deleted_at is not None or row.status != "uploaded":
        return
    try:
        with storage.open_read(row.storage_key) as file:
            report = validate(file)
    except FileNotFoundError:
        if _was_deleted(db, file_id):
            return
        raise
    status = "processed" if report.is_valid else "error"
    with db.write() as tx:
        files.set_validated(tx, file_id, status=status, details=report.details(), report=report.model_dump(mode="json"))


def _was_deleted(db: Database, file_id: str) -> bool:
    with db.read() as tx:
        row = files.by_id(tx, file_id)
    return row is None or row.deleted_at is not None


def _digest(record: Record) -> bytes:
    return hashlib.blake2b(record.model_dump_json().encode(), digest_size=16).digest()


def _warnings(num_duplicates: int, lines: list[int]) -> tuple[str, ...]:
    if not num_duplicates:
        return ()
    named = ", ".join(str(line) for line in lines[:10]) + (", …" if num_duplicates > 10 else "")
    records = (
        "1 record repeats an earlier one" if num_duplicates == 1 else f"{num_duplicates} records repeat earlier ones"
    )
    return (f"{records} (line {named})",)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_DETAILS else text[: MAX_DETAILS - 1] + "…"
