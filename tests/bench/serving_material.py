"""What serving is measured on: a random Llama that never ends by itself, prompts of exact lengths, random adapters.

The rows of the embedding (which is also the head) that belong to control tokens and to tokens that are no whole
characters are zero. Their logit is 0, so greedy decoding never takes one: every answer has the length that was asked
for and text in every token, on every server and without a word to any of them about end tokens.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from service.settings import Settings
from service.store import bases
from service.store import models as registry
from service.store.database import Database
from service.store.instance import DEFAULT_PROJECT
from tests.bench.material import chat_rows, make_base, train_tokenizer
from tests.training import runs
from training.artifact import MANIFEST, Manifest, commit, hash_files
from training.render import Renderer
from training.storage import Storage

RANK = 16
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def make_model(folder: Path, name: str, config: dict[str, Any]) -> Path:
    """A bf16 model folder with tokenizer and chat template, as any server opens it."""
    storage = Storage(str(folder))
    tokenizer = train_tokenizer(chat_rows()[:3000], config["vocab_size"])
    model_folder = Path(storage.path(make_base(storage, name, config, tokenizer, torch.bfloat16).key))
    (model_folder / MANIFEST).unlink()
    (model_folder / "chat_template.jinja").write_text(runs.CHAT_TEMPLATE)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    assert model.config.tie_word_embeddings
    silent = [id for id in range(config["vocab_size"]) if not _is_text(tokenizer, id)]
    with torch.no_grad():
        model.get_input_embeddings().weight[silent] = 0
    model.save_pretrained(model_folder)
    return model_folder


def _is_text(tokenizer: Tokenizer, token_id: int) -> bool:
    text = tokenizer.decode([token_id], skip_special_tokens=True)
    return bool(text) and "\ufffd" not in text


class Prompts:
    """Chats of an exact number of tokens, each with another text, from real rows."""

    def __init__(self, model: Path) -> None:
        self.renderer = Renderer.load(model)
        messages = [message["content"] for row in chat_rows() for message in row["messages"]]
        self._text = "\n".join(messages)
        self._random = random.Random(0)

    def chats(self, num: int, num_tokens: int) -> Iterator[list[dict[str, str]]]:
        """So many conversations of one message."""
        return (self._chat(num_tokens) for _ in range(num))

    def token_ids(self, num: int, num_tokens: int) -> list[list[int]]:
        """The same as token ids."""
        return [self.renderer.encode_prompt(chat) for chat in self.chats(num, num_tokens)]

    def _chat(self, num_tokens: int) -> list[dict[str, str]]:
        """A piece of text from anywhere, cut where it has the length; another piece if no cut has it."""
        while True:
            start = self._random.randrange(len(self._text) - 16 * num_tokens)
            piece = self.renderer.tokenizer.encode(self._text[start : start + 16 * num_tokens])
            for num_kept in range(num_tokens - 8, num_tokens):
                text = self._text[start : start + piece.offsets[num_kept][0]]
                chat = [{"role": "user", "content": text}]
                if len(self.renderer.encode_prompt(chat)) == num_tokens:
                    return chat


def save_adapters(model_folder: Path, folder: Path, num: int) -> list[Path]:
    """PEFT adapters with random factors on all linear layers, in bf16."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    factors = [parameter for name, parameter in peft_model.named_parameters() if "lora_" in name]
    folders = []
    for i in range(num):
        torch.manual_seed(i)
        with torch.no_grad():
            for factor in factors:
                factor.normal_(std=0.02)
        folders.append(folder / f"adapter-{i}")
        peft_model.save_pretrained(folders[-1])
    return folders


def publish_adapters(home: Path, base_id: str, folders: list[Path], model_ids: list[str]) -> None:
    """Rows as a finished training job would leave them; with more ids than folders, ids share bytes."""
    settings = Settings(home=home)
    db, storage = Database(settings.resolved_database_url), Storage(settings.resolved_storage_url)
    with db.read() as tx:
        base = bases.get(tx, base_id)
    assert base.storage_key is not None
    assert base.content_hash is not None
    fingerprint = Renderer.load(storage.local_folder(base.storage_key)).fingerprint("bfloat16", "random")
    commits = []
    for folder in folders:
        key = f"runs/{folder.name}/artifact"
        for name in ADAPTER_FILES:
            storage.write_bytes(f"{key}/{name}", (folder / name).read_bytes())
        files = hash_files(storage, key, list(ADAPTER_FILES))
        manifest = Manifest(
            kind="adapter",
            files=files,
            base_id=base_id,
            base_content_hash=base.content_hash,
            fingerprint=fingerprint,
        )
        commits.append((key, commit(storage, key, manifest)))
    with db.write() as tx:
        for i, model_id in enumerate(model_ids):
            key, manifest_hash = commits[i % len(commits)]
            registry.create(
                tx,
                id=model_id,
                project_id=DEFAULT_PROJECT,
                created_by=None,
                kind="adapter",
                is_checkpoint=False,
                base_id=base_id,
                base_content_hash=base.content_hash,
                parent_id=None,
                job_id=None,
                step=1,
                capabilities=["chat", "completions"],
                storage_key=key,
                manifest_hash=manifest_hash,
                fingerprint=fingerprint.model_dump(),
                spec={},
            )
    db.close()
