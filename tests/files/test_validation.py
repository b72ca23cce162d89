"""Validation reports: of real files, of malformed ones, and what the worker task stores."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from service.files.validation import MAX_LISTED, Report, run_validation, validate
from service.store import files, instance
from service.store.database import Database
from tests.shared import DATA, needs_shared
from training.storage import Storage


def validate_path(path: Path) -> Report:
    with path.open("rb") as file:
        return validate(file)


@needs_shared
@pytest.mark.parametrize(
    ("name", "kind", "num_records"),
    [
        ("openai-cookbook/toy_chat_fine_tuning.jsonl", "chat", 5),
        ("openai-cookbook/drone_training.jsonl", "chat", 103),
        ("mlx-examples/wikisql_train.jsonl", "text", 1000),
        ("mlx-examples/wikisql_valid.jsonl", "text", 100),
        ("ugly-ms-swift/chatml.jsonl", "chat", 3),
    ],
)
def test_real_files_are_accepted(name: str, kind: str, num_records: int) -> None:
    report = validate_path(DATA / name)
    assert report.is_valid, report.details()
    assert (report.kind, report.num_records, report.details()) == (kind, num_records, None)


@needs_shared
def test_a_file_of_an_unknown_shape_names_the_accepted_ones() -> None:
    report = validate_path(DATA / "gsm8k" / "train.jsonl")
    assert (report.num_records, report.num_faults) == (0, 7473)
    assert [error.line for error in report.errors] == list(range(1, MAX_LISTED + 1))
    for shape in ('"messages"', '"prompt" and "completion"', '"text"'):
        assert shape in report.errors[0].message
    assert (report.details() or "").startswith("7473 lines are invalid; line 1: ")


@needs_shared
def test_every_malformed_file_is_refused_with_a_clear_message() -> None:
    paths = sorted(path for path in DATA.glob("ugly-*/**/*") if path.is_file())
    assert len(paths) > 340
    for path in paths:
        report = validate_path(path)
        if path.name == "chatml.jsonl":  # the one good file among them
            assert report.is_valid
            continue
        assert not report.is_valid, path
        details = report.details()
        assert details, path
        details.encode()
        assert len(details) <= 500
        if report.num_faults:
            assert f"line {report.errors[0].line}: " in details, path


@needs_shared
def test_naughty_strings_are_ordinary_text() -> None:
    strings = [text for text in json.loads((DATA / "ugly-blns" / "blns.json").read_text()) if text]
    lines = b"".join(json.dumps({"prompt": text, "completion": text}).encode() + b"\n" for text in strings)
    report = validate(io.BytesIO(lines))
    assert (report.num_records, report.num_faults) == (len(strings), 0)


def test_exact_duplicates_are_counted_and_named() -> None:
    lines = [b'{"text": "a"}', b'{"text": "b"}', b'{ "text" : "a" }', b"", b'{"text": "a"}']
    report = validate(io.BytesIO(b"\n".join(lines)))
    assert report.is_valid
    assert (report.num_duplicates, report.duplicate_lines) == (2, (3, 5))
    assert report.warnings == ("2 records repeat earlier ones (line 3, 5)",)


def test_a_file_of_blank_lines_holds_no_records() -> None:
    report = validate(io.BytesIO(b"\n\n"))
    assert not report.is_valid
    assert report.details() == "the file holds no records, only blank lines"


def stored_file(db: Database, storage: Storage, data: bytes) -> str:
    storage.write_bytes("files/file-1", data)
    with db.write() as tx:
        files.create(
            tx,
            project_id=instance.DEFAULT_PROJECT,
            created_by=None,
            id="file-1",
            filename="a.jsonl",
            purpose="fine-tune",
            size_bytes=len(data),
            sha256="0" * 64,
            storage_key="files/file-1",
        )
    return "file-1"


@pytest.mark.parametrize(
    ("data", "status", "details"),
    [
        (b'{"text": "a"}\n', "processed", None),
        (b'{"text": "a"}\noops\n', "error", "1 line is invalid; line 2: "),
    ],
)
def test_the_worker_task_stores_the_outcome(
    db: Database, storage: Storage, data: bytes, status: str, details: str | None
) -> None:
    file_id = stored_file(db, storage, data)
    run_validation(db, storage, file_id)
    run_validation(db, storage, file_id)  # a second delivery changes nothing
    with db.read() as tx:
        row = files.by_id(tx, file_id)
    assert row is not None
    assert row.status == status
    assert (row.status_details or "").startswith(details or "")
    assert (row.status_details is None) == (details is None)
    assert row.report == validate(io.BytesIO(data)).model_dump(mode="json")


def test_the_worker_task_bears_that_the_file_was_deleted(db: Database, storage: Storage) -> None:
    file_id = stored_file(db, storage, b'{"text": "a"}\n')
    with db.write() as tx:
        files.delete(tx, instance.DEFAULT_PROJECT, file_id)
    storage.delete("files/file-1")
    run_validation(db, storage, file_id)
    run_validation(db, storage, "file-of-nobody")
    with db.read() as tx:
        row = files.by_id(tx, file_id)
    assert row is not None
    assert row.status == "uploaded"
