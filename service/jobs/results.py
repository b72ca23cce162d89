"""The result file of a job: one CSV in OpenAI's columns, built from the job's one curve."""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import dataclass

from sqlalchemy.orm import Session

from service.store import files, metrics
from service.store.database import new_id
from service.store.tables import File, Job
from training.storage import Storage

COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


@dataclass(frozen=True)
class ResultFile:
    """A CSV whose bytes are in storage and that has no row yet."""

    storage_key: str
    size_bytes: int
    sha256: str


def write(storage: Storage, job_id: str, text: str) -> ResultFile:
    """Store the CSV in the job's run folder: written again after a crash, it replaces itself."""
    data, key = text.encode(), f"runs/{job_id}/results.csv"
    storage.write_bytes(key, data)
    return ResultFile(storage_key=key, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def add_row(tx: Session, job: Job, result: ResultFile) -> File:
    """Make the CSV a file of the job's project."""
    return files.create(
        tx,
        project_id=job.project_id,
        created_by=job.created_by,
        id=new_id("file-"),
        filename="step_metrics.csv",
        purpose="fine-tune-results",
        size_bytes=result.size_bytes,
        sha256=result.sha256,
        storage_key=result.storage_key,
        status="processed",
    )


def as_csv(tx: Session, job_id: str) -> str:
    """One line per step; validation columns are empty at steps without an evaluation. What a method reports beside
    OpenAI's columns (the rewards of dpo) stands behind them."""
    lines: dict[int, dict[str, object]] = {}
    for row in metrics.merged(tx, job_id):
        line = lines.setdefault(row.step, {"step": row.step})
        if row.kind == "step":
            line |= {"train_loss": row.data["train_loss"], "train_accuracy": row.data["train_mean_token_accuracy"]}
        else:
            line |= {name: row.data[name] for name in ("valid_loss", "valid_mean_token_accuracy")}
        line |= row.data.get("means", {})
    others = sorted({name for line in lines.values() for name in line} - set(COLUMNS))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*COLUMNS, *others], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines[step] for step in sorted(lines))
    return text.getvalue()
