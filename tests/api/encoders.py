"""Callable classifiers and embedding models for API tests: tiny and random, but real folders and a real engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from service.platform import Platform
from service.store import bases
from service.store import models as registry
from service.store.instance import DEFAULT_PROJECT
from tests.engine.encoders import CONTEXT, save_classifier, save_encoder
from training.artifact import Manifest, commit, hash_files
from training.render import Renderer

ENCODER = "tiny-encoder"
CLASSIFIER = "ft:tiny-encoder:local::classes"
BINARY = "ft:tiny-encoder:local::binary"


def add_encoders(platform: Platform) -> dict[str, Path]:
    """An embedding base, a classifier of three labels and one of two; returns their folders."""
    folders = {ENCODER: add_encoder_base(platform)}
    folders[CLASSIFIER] = add_classifier(platform, CLASSIFIER, save_classifier)
    folders[BINARY] = add_classifier(platform, BINARY, lambda folder: save_classifier(folder, ("No", "Yes")))
    return folders


def add_encoder_base(platform: Platform) -> Path:
    """A ready base that embeds."""
    key = f"bases/{ENCODER}"
    folder = save_encoder(Path(platform.storage.path(key)), pooling="mean_tokens")
    manifest_hash = _commit(platform, key, folder, "base")
    with platform.db.write() as tx:
        bases.add(tx, project_id=DEFAULT_PROJECT, created_by=None, id=ENCODER, source=str(folder), revision=None)
        bases.set_ready(
            tx,
            ENCODER,
            storage_key=key,
            content_hash=ENCODER,
            manifest_hash=manifest_hash,
            fingerprint={},
            capabilities=["embed"],
            architecture="BertModel",
            num_parameters=1,
            max_context=CONTEXT,
        )
    return folder


def add_classifier(platform: Platform, model_id: str, save: Callable[[Path], Path]) -> Path:
    """A published full fine-tune with labels."""
    key = f"runs/{model_id.rpartition(':')[2]}/artifact"
    folder = save(Path(platform.storage.path(key)))
    manifest_hash = _commit(platform, key, folder, "full")
    with platform.db.write() as tx:
        registry.create(
            tx,
            id=model_id,
            project_id=DEFAULT_PROJECT,
            created_by=None,
            kind="full",
            is_checkpoint=False,
            base_id=ENCODER,
            base_content_hash=ENCODER,
            parent_id=None,
            job_id=None,
            step=1,
            capabilities=["classify"],
            storage_key=key,
            manifest_hash=manifest_hash,
            fingerprint={},
            spec={},
        )
    return folder


def _commit(platform: Platform, key: str, folder: Path, kind: str) -> str:
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    manifest = Manifest.model_validate(
        {
            "kind": kind,
            "files": hash_files(platform.storage, key, names),
            "base_id": ENCODER,
            "base_content_hash": ENCODER,
            "fingerprint": Renderer.load(folder).fingerprint(dtype="float32", adapter="none"),
        }
    )
    return commit(platform.storage, key, manifest)
