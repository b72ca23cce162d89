"""Leftovers go, what counts stays."""

from __future__ import annotations

from sqlalchemy import select

from service.files.cleanup import expire_files, sweep_incoming, sweep_orphans
from service.files.upload import FILES, INCOMING
from service.store import files, instance
from service.store.database import Database, now
from service.store.tables import Task
from training.storage import Storage


def add_row(db: Database, file_id: str, expires_at: float | None = None) -> None:
    with db.write() as tx:
        files.create(
            tx,
            project_id=instance.DEFAULT_PROJECT,
            created_by=None,
            id=file_id,
            filename="a",
            purpose="user_data",
            size_bytes=1,
            sha256="0" * 64,
            storage_key=f"{FILES}/{file_id}",
            expires_at=expires_at,
        )


def test_leftovers_of_killed_uploads_go_once_they_are_old(storage: Storage) -> None:
    assert sweep_incoming(storage, 0.0) == 0
    storage.write_bytes(f"{INCOMING}/file-1", b"x")
    assert sweep_incoming(storage, 3600.0) == 0
    assert storage.list_names(INCOMING) == ["file-1"]
    assert sweep_incoming(storage, -1.0) == 1
    assert storage.list_names(INCOMING) == []


def test_only_bytes_without_a_row_are_orphans(db: Database, storage: Storage) -> None:
    for name in ("file-kept", "file-lost"):
        storage.write_bytes(f"{FILES}/{name}", b"x")
    add_row(db, "file-kept")
    assert sweep_orphans(db, storage, 3600.0) == 0
    assert sweep_orphans(db, storage, -1.0) == 1
    assert storage.list_names(FILES) == ["file-kept"]


def test_files_are_deleted_when_their_time_is_over(db: Database) -> None:
    add_row(db, "file-old", now() - 1)
    add_row(db, "file-young", now() + 3600)
    add_row(db, "file-eternal")
    assert expire_files(db) == 1
    assert expire_files(db) == 0
    with db.read() as tx:
        gone = [name for name in ("file-old", "file-young", "file-eternal") if _is_deleted(files.by_id(tx, name))]
        tasks = [(task.kind, task.payload) for task in tx.scalars(select(Task))]
    assert gone == ["file-old"]
    assert tasks == [("delete_folder", {"key": f"{FILES}/file-old"})]


def _is_deleted(row: files.File | None) -> bool:
    return row is not None and row.deleted_at is not None
