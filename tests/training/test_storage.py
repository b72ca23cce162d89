"""Folders of a remote store come to this machine whole, once, and never stale."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from training.storage import Storage


class Far(DirFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A store that is not the local one, and remembers what it has listed, as that of S3 does. (`memory://` shares one
    position among all who read a file.)"""

    protocol = "far"
    root = ""

    def __init__(self, **options: Any) -> None:
        super().__init__(path=self.root, fs=LocalFileSystem(), **options)
        self._listed: dict[str, list[str]] = {}

    def find(self, path: str, **options: Any) -> list[str]:
        """All files below."""
        return self._listed.setdefault(path, super().find(path, **options))

    def invalidate_cache(self, path: str | None = None) -> None:
        """Forget."""
        self._listed.clear()


@pytest.fixture(autouse=True)
def _far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("far", Far, clobber=True)
    monkeypatch.setattr(Far, "root", str(tmp_path / "far"))
    Far.clear_instance_cache()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def remote(cache: Path, name: str) -> Storage:
    return Storage(f"far://{name}", str(cache))


def commit(storage: Storage, text: str, num_files: int = 20) -> None:
    for number in range(num_files):
        storage.write_bytes(f"bases/one/{number}", text.encode())
    storage.write_bytes("bases/one/manifest.json", text.encode())


def test_workers_that_fetch_a_folder_at_once_all_get_it_whole(cache: Path) -> None:
    name = uuid4().hex
    commit(remote(cache, name), "weights")

    def fetch(_: int) -> list[str]:
        folder = remote(cache, name).local_folder("bases/one")
        return sorted(file.name for file in folder.iterdir() if file.read_text() == "weights")

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(fetch, range(8)))
    assert all(len(names) == 21 for names in found)
    (copies,) = cache.iterdir()
    assert len(list(copies.iterdir())) == 1, "one copy, and nothing half-fetched beside it"


def test_a_copy_is_not_taken_for_another_store_or_an_older_folder(cache: Path) -> None:
    first, other = remote(cache, uuid4().hex), remote(cache, uuid4().hex)
    commit(first, "old")
    commit(other, "other")
    old = first.local_folder("bases/one")
    assert (other.local_folder("bases/one") / "0").read_text() == "other"
    commit(first, "new")
    assert (first.local_folder("bases/one") / "0").read_text() == "new"
    assert (old / "0").read_text() == "old", "whoever still reads it keeps it"


def test_a_folder_without_a_manifest_is_not_there(cache: Path) -> None:
    storage = remote(cache, uuid4().hex)
    storage.write_bytes("bases/one/0", b"half")
    with pytest.raises(FileNotFoundError):
        storage.local_folder("bases/one")


def test_files_that_another_process_has_added_since_the_last_listing_come_too(cache: Path) -> None:
    storage = remote(cache, uuid4().hex)
    commit(storage, "old", num_files=2)
    storage.local_folder("bases/one")
    commit(storage, "new", num_files=5)
    assert len(list(storage.local_folder("bases/one").iterdir())) == 6


def test_a_download_that_breaks_leaves_nothing_and_may_be_tried_again(cache: Path) -> None:
    storage = remote(cache, uuid4().hex)
    commit(storage, "weights")
    torn = Path(Far.root, storage.path("bases/one/torn"))
    torn.symlink_to("nowhere")
    with pytest.raises(FileNotFoundError):
        storage.local_folder("bases/one")
    (copies,) = cache.iterdir()
    assert list(copies.iterdir()) == []
    torn.unlink()
    assert len(list(storage.local_folder("bases/one").iterdir())) == 21
