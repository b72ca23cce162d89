"""What lies in storage without a row, and rows whose time is over. Called by the orchestrator, off its tick."""

from __future__ import annotations

import time

from service.files.upload import FILES, INCOMING
from service.store import files, jobs, tasks
from service.store.database import Database, now
from training.storage import Storage


def sweep_incoming(storage: Storage, older_than_s: float) -> int:
    """Remove what killed uploads left behind; the age keeps uploads that still run. Returns how many went."""
    stale = _stale(storage, INCOMING, older_than_s)
    for name in stale:
        storage.delete(f"{INCOMING}/{name}")
    return len(stale)


def sweep_orphans(db: Database, storage: Storage, older_than_s: float) -> int:
    """Remove complete bytes whose row was never written. Returns how many went."""
    num_removed = 0
    for name in _stale(storage, FILES, older_than_s):
        with db.read() as tx:
            known = files.by_id(tx, name) is not None
        if not known:
            storage.delete(f"{FILES}/{name}")
            num_removed += 1
    return num_removed


def expire_files(db: Database) -> int:
    """Delete the files whose time is over, but for those that an unfinished job still needs. Returns how many went."""
    with db.read() as tx:
        if not files.expired(tx, now()):
            return 0
    num_deleted = 0
    with db.write() as tx:
        for row in files.expired(tx, now()):
            if jobs.open_with_file(tx, row.id) is None:
                files.delete(tx, row.project_id, row.id)
                tasks.add(tx, "delete_folder", {"key": row.storage_key})
                num_deleted += 1
    return num_deleted


def _stale(storage: Storage, folder: str, older_than_s: float) -> list[str]:
    limit = time.time() - older_than_s
    return [name for name in storage.list_names(folder) if _modified_at(storage, f"{folder}/{name}") < limit]


def _modified_at(storage: Storage, key: str) -> float:
    try:
        return float(storage.fs.modified(storage.path(key)).timestamp())
    except FileNotFoundError:  # gone since it was listed
        return float("inf")
