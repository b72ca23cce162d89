"""Small real runs for tests: a tiny base model on disk, a training file, a spec, and a channel that remembers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from training.artifact import Fingerprint, Manifest, commit, hash_files
from training.progress import Item, ProgressItem, Wish
from training.spec import BaseRef, DpoSpec, Hyperparameters, LoraSpec, TrainSpec
from training.storage import Storage

BASE_KEY = "bases/tiny"
SPECIALS = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # far enough from zero for an adapter to have something to work on
    "tie_word_embeddings": True,
}
GPT_NEO: dict[str, Any] = {
    "model_type": "gpt_neo",
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "max_position_embeddings": 128,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 16,
    "initializer_range": 0.2,
}


def make_base(storage: Storage, model: dict[str, Any] = LLAMA, dtype: torch.dtype = torch.float32) -> BaseRef:
    """A random model with a byte tokenizer and a chat template, committed like any base."""
    folder = Path(storage.path(BASE_KEY))
    folder.mkdir(parents=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIALS, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": 128,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    write_model(folder, {"vocab_size": len(SPECIALS) + len(alphabet), **model}, dtype)
    names = [file.name for file in folder.iterdir()]
    fingerprint = Fingerprint(chat_template="-", tokenizer="-", special_tokens="-", dtype="float32", adapter="none")
    manifest = Manifest(
        kind="base",
        files=hash_files(storage, BASE_KEY, names),
        base_id="tiny",
        base_content_hash="tiny",
        fingerprint=fingerprint,
    )
    commit(storage, BASE_KEY, manifest)
    return BaseRef(id="tiny", key=BASE_KEY, content_hash="tiny")


def write_model(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Seeded random weights."""
    torch.manual_seed(0)
    fields = {**config, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
    model.to(dtype).save_pretrained(folder)


def write_rows(storage: Storage, key: str, num_rows: int = 12, first: int = 0) -> str:
    """Chat rows of different lengths."""
    rows = []
    for i in range(first, first + num_rows):
        answer = f"{i} is {'even' if i % 2 == 0 else 'odd'}" + "!" * (i % 5)
        messages = [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": messages}))
    storage.write_bytes(key, "\n".join(rows).encode())
    return key


def write_preferences(storage: Storage, key: str, num_rows: int = 12, first: int = 0) -> str:
    """Preference rows of different lengths: the better answer ends with "!", the worse one with "?"."""
    rows = []
    for i in range(first, first + num_rows):
        better, worse = ([{"role": "assistant", "content": f"{i % 3}" + mark * (1 + i % 4)}] for mark in "!?")
        asked = {"messages": [{"role": "user", "content": f"what is {i}?"}]}
        rows.append(json.dumps({"input": asked, "preferred_output": better, "non_preferred_output": worse}))
    storage.write_bytes(key, "\n".join(rows).encode())
    return key


def make_dpo_spec(
    storage: Storage, base: BaseRef, lora: bool = True, loss_type: str = "sigmoid", **changes: Any
) -> TrainSpec:
    """The same over preference rows."""
    settings = {"beta": 0.5, "gamma": 1.0 if loss_type == "simpo" else 0.0, "loss_type": loss_type}
    own = {
        "method": "dpo",
        "dpo": DpoSpec.model_validate(settings),
        "training_key": write_preferences(storage, "files/pairs"),
    }
    return make_spec(storage, base, lora, **{**own, **changes})


def make_spec(storage: Storage, base: BaseRef, lora: bool = True, dropout: float = 0.0, **changes: Any) -> TrainSpec:
    """A resolved spec over 12 rows in 3 steps per epoch; hyperparameters may be given beside the spec's own fields."""
    hyper: dict[str, Any] = {
        "n_epochs": 4,
        "batch_size": 4,
        "learning_rate_multiplier": 1.0,
        "learning_rate": 0.01,
        "gradient_accumulation_steps": 1,
        "max_length": 128,
    }
    hyper |= {name: changes.pop(name) for name in list(changes) if name in Hyperparameters.model_fields}
    fields: dict[str, Any] = {
        "base": base,
        "training_key": write_rows(storage, "files/train"),
        "adapter": LoraSpec(rank=4, alpha=8.0, dropout=dropout) if lora else None,
        "precision": "fp32",
        "eval_interval": 5,
        "checkpoint_interval": 5,
    }
    return TrainSpec(hyperparameters=Hyperparameters(**hyper), **{**fields, **changes})


class Recorder:
    """A channel that keeps what it is told, and wishes for something once a step is reached."""

    def __init__(self, wish: Wish = Wish.GO_ON, at_step: int = 0) -> None:
        self.items: list[ProgressItem] = []
        self._wish, self._at_step = wish, at_step

    def send(self, items: list[ProgressItem]) -> Wish:
        self.items += items
        reached = any(getattr(item, "step", 0) >= self._at_step for item in self.items)
        return self._wish if reached else Wish.GO_ON

    def of(self, kind: type[Item]) -> list[Any]:
        """All items of a kind, in order."""
        return [item for item in self.items if isinstance(item, kind)]
