"""Folders that count: bases, checkpoints and artifacts with a manifest written last.

The manifest lists every file with size and sha256; its own hash names the content. A folder without a manifest is
unfinished and is ignored by every reader.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from training.spec import Contract, TrainSpec
from training.storage import Storage

MANIFEST = "manifest.json"
REPORT_FILE = "evaluation.json"  # of a classifier that was validated, see `training.classification_metrics`


class FileEntry(Contract):
    """One file of a folder."""

    size_bytes: int
    sha256: str


class Fingerprint(Contract):
    """What serving must share with training for the tokens to mean the same; each value is a sha256 or a plain name."""

    chat_template: str
    tokenizer: str
    special_tokens: str
    dtype: str
    adapter: str  # "none", or a hash of the adapter's configuration


class Manifest(Contract):
    """The commit record of a folder."""

    kind: Literal["base", "checkpoint", "adapter", "full"]
    files: dict[str, FileEntry]  # by path relative to the folder
    base_id: str
    base_content_hash: str
    fingerprint: Fingerprint
    spec: TrainSpec | None = None  # the resolved spec; None for a base
    step: int | None = None  # that the weights are of
    last_step: int | None = None  # of an artifact: the run's last, when its best checkpoint may be an earlier one

    def stored(self) -> bytes:
        """The canonical JSON. Fields that nobody set stay out: one added later changes no hash of old folders."""
        return canonical_json(self.model_dump(mode="json", exclude_unset=True))

    def hash(self) -> str:
        """sha256 of the stored bytes: the same content gives the same hash."""
        return hashlib.sha256(self.stored()).hexdigest()


class BrokenFolder(Exception):
    """A folder is not complete, or its bytes are not those that its manifest names."""


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys and no spaces, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def hash_file(storage: Storage, key: str) -> FileEntry:
    """Size and sha256 of one stored file."""
    digest, size = hashlib.sha256(), 0
    with storage.open_read(key) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return FileEntry(size_bytes=size, sha256=digest.hexdigest())


def hash_files(storage: Storage, key: str, names: list[str]) -> dict[str, FileEntry]:
    """Entries for the named files of a folder."""
    return {name: hash_file(storage, f"{key}/{name}") for name in sorted(names)}


def commit(storage: Storage, key: str, manifest: Manifest) -> str:
    """Write the manifest, which makes the folder count; returns its hash."""
    storage.write_bytes(f"{key}/{MANIFEST}", manifest.stored())
    return manifest.hash()


def read_manifest(storage: Storage, key: str) -> Manifest | None:
    """The folder's manifest, or None while the folder is unfinished or absent."""
    try:
        data = storage.read_bytes(f"{key}/{MANIFEST}")
    except FileNotFoundError:
        return None
    try:
        return Manifest.model_validate_json(data)
    except ValueError:
        return None  # cut short by a crash while it was written: the folder was never committed


def verify(storage: Storage, key: str, manifest_hash: str) -> Manifest:
    """Check manifest and every byte; BrokenFolder says what is wrong."""
    manifest = read_manifest(storage, key)
    if manifest is None:
        raise BrokenFolder(f"{key}: no manifest, the folder is unfinished")
    if manifest.hash() != manifest_hash:
        raise BrokenFolder(f"{key}: the manifest is not the one recorded")
    for name, entry in manifest.files.items():
        try:
            found = hash_file(storage, f"{key}/{name}")
        except FileNotFoundError:
            raise BrokenFolder(f"{key}/{name}: missing") from None
        if found != entry:
            raise BrokenFolder(f"{key}/{name}: content differs from the manifest")
    return manifest
