"""A small real world to serve: a base with a byte tokenizer and a chat template, adapters on it, a full model.

Folders are real and committed, weights are missing: the echo engine needs none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from service.settings import Settings
from service.store import bases, instance
from service.store import models as registry
from service.store.database import Database
from service.store.instance import DEFAULT_PROJECT
from tests.database import migrated
from training.artifact import Fingerprint, Manifest, commit, hash_files
from training.render import Renderer
from training.starter.tokenizer import chat_template
from training.storage import Storage

MAX_CONTEXT = 256
CAPABILITIES = ["chat", "completions"]


def new_world(home: Path, **settings: object) -> tuple[Settings, Database, Storage, str]:
    """A migrated database and an empty storage; the last item is the instance id."""
    made = Settings(**{"home": home, "engine": "echo", **settings})  # type: ignore[arg-type]
    db = migrated(made.resolved_database_url)
    with db.write() as tx:
        instance_id = instance.get_or_create(tx)
    return made, db, Storage(made.resolved_storage_url), instance_id


def add_base(
    db: Database, storage: Storage, base_id: str, *, template: str | None = None, capabilities: list[str] = CAPABILITIES
) -> Manifest:
    """A ready base."""
    key = f"bases/{base_id}"
    manifest, manifest_hash = _write(storage, key, base_id, "base", template or chat_template())
    with db.write() as tx:
        bases.add(tx, project_id=DEFAULT_PROJECT, created_by=None, id=base_id, source="starter", revision=None)
        bases.set_ready(
            tx,
            base_id,
            storage_key=key,
            content_hash=manifest.base_content_hash,
            manifest_hash=manifest_hash,
            fingerprint=manifest.fingerprint.model_dump(),
            capabilities=capabilities,
            architecture="LlamaForCausalLM",
            num_parameters=1,
            max_context=MAX_CONTEXT,
        )
    return manifest


def add_model(
    db: Database,
    storage: Storage,
    base_id: str,
    model_id: str,
    *,
    kind: Literal["adapter", "full"] = "adapter",
    template: str | None = None,
    project_id: str = DEFAULT_PROJECT,
    is_checkpoint: bool = False,
) -> str:
    """A published fine-tuned model; returns its storage key."""
    key = f"runs/{model_id.replace(':', '_')}/artifact"
    manifest, manifest_hash = _write(storage, key, base_id, kind, template or chat_template())
    with db.write() as tx:
        registry.create(
            tx,
            id=model_id,
            project_id=project_id,
            created_by=None,
            kind=kind,
            is_checkpoint=is_checkpoint,
            base_id=base_id,
            base_content_hash=manifest.base_content_hash,
            parent_id=None,
            job_id=None,
            step=1,
            capabilities=CAPABILITIES,
            storage_key=key,
            manifest_hash=manifest_hash,
            fingerprint=manifest.fingerprint.model_dump(),
            spec={},
        )
    return key


def _write(
    storage: Storage, key: str, base_id: str, kind: Literal["base", "adapter", "full"], template: str
) -> tuple[Manifest, str]:
    special = '{"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}'
    storage.write_bytes(f"{key}/tokenizer.json", _byte_tokenizer().to_str().encode())
    storage.write_bytes(f"{key}/tokenizer_config.json", special.encode())
    storage.write_bytes(f"{key}/chat_template.jinja", template.encode())
    renderer = Renderer.load(storage.local_folder(key))
    names = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
    fingerprint: Fingerprint = renderer.fingerprint(dtype="fp32", adapter="none")
    content_hash = f"{base_id:0<64}".replace(":", "-")
    files = hash_files(storage, key, names)
    manifest = Manifest(
        kind=kind, files=files, base_id=base_id, base_content_hash=content_hash, fingerprint=fingerprint
    )
    return manifest, commit(storage, key, manifest)


def _byte_tokenizer() -> Tokenizer:
    """One token per byte, and the three control tokens of the template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: id for id, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    )
    return tokenizer
