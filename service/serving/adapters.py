"""Fine-tuned models on a replica: fetch, verify and understand each once. Weights in memory are the engine's matter."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from service.engine.protocol import AdapterMismatch, AdapterRef
from service.serving.messages import Folder, Target
from training.artifact import BrokenFolder, Fingerprint, Manifest, read_manifest, verify
from training.render import Renderer
from training.storage import Storage

log = logging.getLogger(__name__)

MAX_PREPARED = 1024  # a path and mostly the base's own renderer each


@dataclass(frozen=True)
class Prepared:
    """A verified folder on local disk, and how its prompts are rendered."""

    ref: AdapterRef
    renderer: Renderer


class AdapterShelf:
    """Prepares adapters; requests that come for the same one meanwhile wait for the one preparation."""

    def __init__(self, storage: Storage, base: Manifest, base_renderer: Renderer) -> None:
        self._storage = storage
        self._base = base
        self._base_renderer = base_renderer
        self._tasks: OrderedDict[str, asyncio.Task[Prepared]] = OrderedDict()

    def is_ready(self, model_id: str) -> bool:
        """Whether the model was prepared before."""
        task = self._tasks.get(model_id)
        return task is not None and task.done()

    async def get(self, target: Target) -> Prepared:
        """The model's folder. BrokenFolder, AdapterMismatch or RenderError are tried again by the next request."""
        assert target.adapter is not None
        task = self._tasks.get(target.model_id)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(self._prepare, target.model_id, target.adapter))
            self._tasks[target.model_id] = task
            while len(self._tasks) > MAX_PREPARED:
                self._tasks.popitem(last=False)
        self._tasks.move_to_end(target.model_id)
        try:
            return await asyncio.shield(task)
        except Exception:
            self._tasks.pop(target.model_id, None)
            raise

    def _prepare(self, model_id: str, folder: Folder) -> Prepared:
        manifest = verify(self._storage, folder.key, folder.manifest_hash)
        check_weights(manifest, self._base)
        local = self._storage.local_folder(folder.key)
        return Prepared(AdapterRef(model_id, local), self._renderer(local, manifest))

    def _renderer(self, folder: Path, manifest: Manifest) -> Renderer:
        """The base's renderer where it means the same, which saves a tokenizer per adapter; else the artifact's own."""
        trained, served = manifest.fingerprint, fingerprint(self._base_renderer)
        if (trained.tokenizer, trained.special_tokens) != (served.tokenizer, served.special_tokens):
            raise AdapterMismatch("it was trained with another tokenizer or other special tokens than its base has")
        if trained.chat_template == served.chat_template:
            return self._base_renderer
        renderer = Renderer.load(folder)
        check_template(renderer, manifest)
        return renderer


@dataclass(frozen=True)
class Opened:
    """A replica's own folder on local disk, as it was recorded."""

    manifest: Manifest
    local: Path
    renderer: Renderer


def open_folder(storage: Storage, folder: Folder) -> Opened:
    """BrokenFolder if the folder is not the recorded one, AdapterMismatch if its tokenizer gives other tokens."""
    manifest = read_manifest(storage, folder.key)
    if manifest is None or manifest.hash() != folder.manifest_hash:
        raise BrokenFolder(f"{folder.key}: no manifest, or not the one recorded")
    local = storage.local_folder(folder.key)
    renderer = Renderer.load(local)
    check_template(renderer, manifest)
    return Opened(manifest, local, renderer)


def check_weights(adapter: Manifest, base: Manifest | None) -> None:
    """AdapterMismatch if the base is not the one that the adapter was trained on."""
    if base is None or adapter.base_content_hash != base.base_content_hash:
        raise AdapterMismatch("it was trained on other weights than those that are served here")


def fingerprint(renderer: Renderer) -> Fingerprint:
    """What the renderer shares with training; the other fields are not its matter."""
    return renderer.fingerprint(dtype="", adapter="")


def check_template(renderer: Renderer, manifest: Manifest) -> None:
    """AdapterMismatch if a folder's tokenizer files give other tokens than training recorded."""
    found, recorded = fingerprint(renderer), manifest.fingerprint
    for name in ("chat_template", "tokenizer", "special_tokens"):
        if getattr(found, name) != getattr(recorded, name):
            raise AdapterMismatch(f"its {name.replace('_', ' ')} is not the one that it was trained with")
