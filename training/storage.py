"""Files of the platform by relative key: one root by URL, a local folder by default, S3 and friends through fsspec.

Nothing depends on rename or append. A folder counts only once `manifest.json`, written last, is in it; see
`training.artifact`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO

import fsspec
from fsspec.implementations.local import LocalFileSystem


class Storage:
    """One storage root. Keys are relative, '/'-separated, and never leave the root."""

    def __init__(self, url: str, cache_dir: str | None = None) -> None:
        """`url` is a folder or an fsspec URL; `cache_dir` keeps local copies of remote folders."""
        self.url = url
        self.fs, self._root = fsspec.core.url_to_fs(url)
        self._root = self._root.rstrip("/")
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self._cache_dir = cache_dir

    def path(self, key: str) -> str:
        """Absolute path of a key within the file system. ValueError on keys that would leave the root."""
        parts = key.split("/")
        if not key or key.startswith("/") or "\\" in key or any(part in ("", ".", "..") for part in parts):
            raise ValueError(f"bad storage key: {key!r}")
        return f"{self._root}/{key}"

    def open_write(self, key: str) -> IO[bytes]:
        """Open a key for writing from the start."""
        path = self.path(key)
        self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        return self.fs.open(path, "wb")

    def open_read(self, key: str) -> IO[bytes]:
        """Open a key for reading; FileNotFoundError if it is not there."""
        return self.fs.open(self.path(key), "rb")

    def write_bytes(self, key: str, data: bytes) -> None:
        """Write one small file whole."""
        with self.open_write(key) as file:
            file.write(data)

    def read_bytes(self, key: str) -> bytes:
        """Read one small file whole."""
        with self.open_read(key) as file:
            return file.read()

    def copy(self, source: str, target: str) -> None:
        """Copy one file, inside the store where it can do that by itself."""
        path = self.path(target)
        self.fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        self.fs.cp_file(self.path(source), path)

    def exists(self, key: str) -> bool:
        """Whether a file or folder is at the key (asked afresh, no listing cache)."""
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self.path(key)))

    def list_names(self, key: str) -> list[str]:
        """Names directly below a folder, sorted; empty if it is not there."""
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(self.path(key), detail=False)
        except FileNotFoundError:
            return []
        return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)

    def delete(self, key: str) -> None:
        """Delete a file or a folder with all that is in it; nothing happens if it is not there."""
        path = self.path(key)
        if self.fs.exists(path):
            self.fs.rm(path, recursive=True)

    def put_folder(self, local: Path, key: str) -> None:
        """Copy a local folder's files to a key. Write the manifest afterwards: it is the commit."""
        for file in sorted(local.rglob("*")):
            if file.is_file():
                target = f"{key}/{file.relative_to(local).as_posix()}"
                with file.open("rb") as source, self.open_write(target) as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)

    def local_folder(self, key: str) -> Path:
        """A local path with the committed folder's content: the folder itself on local storage, a copy otherwise.

        Copies are named by the store and the manifest, so one is never stale, nor of another store; processes that
        fetch the same folder at once end with one complete copy.
        """
        if self.is_local:
            return Path(self.path(key))
        manifest = self.read_bytes(f"{key}/manifest.json")
        name = hashlib.sha256(self.url.encode() + b"\0" + manifest).hexdigest()[:32]
        copy = Path(self._cache_dir or tempfile.gettempdir()) / f"tunesmith-cache-{os.getuid()}" / name
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            staging = Path(tempfile.mkdtemp(prefix="fetch-", dir=copy.parent))
            try:
                self.fs.invalidate_cache()  # the manifest is new: so may be files beside it
                files = self.fs.find(self.path(key))
                self.fs.get(files, [str(staging / name[len(self.path(key)) + 1 :]) for name in files])
                staging.rename(copy)
            except OSError:
                if not copy.exists():  # else another process was quicker
                    raise
            finally:
                shutil.rmtree(staging, ignore_errors=True)  # nothing is there where it became the copy
        return copy
