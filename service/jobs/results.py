"""The result files of a job: one CSV in OpenAI's columns, built from the job's one curve, and a classifier's report."""

from __future__ import annotations

import csv
import hashlib
import io
from dataclasses import dataclass

from sqlalchemy.orm import Session

from service.store import files, metrics
from service.store.database import new_id
from service.store.tables import File, Job
from training.artifact import REPORT_FILE, Manifest
from training.storage import Storage

CSV_FILE = "step_metrics.csv"
COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


@dataclass(frozen=True)
class ResultFile:
    """A file whose bytes are in storage and that has no row yet."""

    filename: str
    storage_key: str
    size_bytes: int
    sha256: str


def write(storage: Storage, job_id: str, csv_text: str, artifact_key: str, manifest: Manifest) -> list[ResultFile]:
    """Store the files in the job's run folder: written again after a crash, they replace themselves."""
    texts = {CSV_FILE: csv_text.encode()}
    if REPORT_FILE in manifest.files:
        texts[REPORT_FILE] = storage.read_bytes(f"{artifact_key}/{REPORT_FILE}")
    made = []
    for name, data in texts.items():
        key = f"runs/{job_id}/results/{name}"
        storage.write_bytes(key, data)
        made.append(ResultFile(name, key, len(data), hashlib.sha256(data).hexdigest()))
    return made


def add_row(tx: Session, job: Job, result: ResultFile) -> File:
    """Make it a file of the job's project."""
    return files.create(
        tx,
        project_id=job.project_id,
        created_by=job.created_by,
        id=new_id("file-"),
        filename=result.filename,
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
