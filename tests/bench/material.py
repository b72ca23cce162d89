"""What training is measured on: random models of two sizes with one tokenizer, and real chat rows."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.shared import DATA
from tests.training.runs import SPECIALS, write_model
from training.artifact import Fingerprint, Manifest, commit, hash_files
from training.records import iter_records
from training.render import Example, Renderer
from training.spec import BaseRef
from training.storage import Storage

MAX_LENGTH = 512
VOCAB_SIZE = 8192
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_COMMON: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}
SIZES: dict[str, dict[str, Any]] = {
    "8m": {
        **_COMMON,
        "hidden_size": 288,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
    },
    "110m": {
        **_COMMON,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}


def chat_rows() -> list[dict[str, Any]]:
    """Questions and answers of two public data sets, shuffled."""
    alpaca = json.loads((DATA / "llamafactory/alpaca_en_demo.json").read_text())
    pairs = [(f"{row['instruction']}\n{row['input']}".strip(), row["output"]) for row in alpaca]
    lines = (DATA / "gsm8k/train.jsonl").read_text().splitlines()
    pairs += [(row["question"], row["answer"]) for row in map(json.loads, lines)]
    random.Random(0).shuffle(pairs)
    return [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in pairs
    ]


def make_bases(storage: Storage, rows: list[dict[str, Any]]) -> dict[str, BaseRef]:
    """Both models, committed like any base."""
    tokenizer = train_tokenizer(rows)
    return {size: make_base(storage, size, SIZES[size], tokenizer) for size in SIZES}


def train_tokenizer(rows: list[dict[str, Any]], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Byte-level BPE of at most so many tokens, learnt from the rows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((message["content"] for row in rows for message in row["messages"]), trainer)
    return tokenizer


def make_base(
    storage: Storage, size: str, model: dict[str, Any], tokenizer: Tokenizer, dtype: torch.dtype = torch.float32
) -> BaseRef:
    """A random model of this configuration with the tokenizer, committed under the name of its size."""
    key = f"bases/{size}"
    folder = Path(storage.path(key))
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "model_max_length": model["max_position_embeddings"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    write_model(folder, model, dtype)
    stored = str(dtype).removeprefix("torch.")
    fingerprint = Fingerprint(chat_template="-", tokenizer="-", special_tokens="-", dtype=stored, adapter="none")
    files = hash_files(storage, key, [file.name for file in folder.iterdir()])
    manifest = Manifest(kind="base", files=files, base_id=size, base_content_hash=size, fingerprint=fingerprint)
    commit(storage, key, manifest)
    return BaseRef(id=size, key=key, content_hash=size)


class Rows:
    """The rows that fit, with their lengths."""

    def __init__(self, folder: Path, rows: list[dict[str, Any]]) -> None:
        lines = [json.dumps(row) for row in rows]
        records = [record for _, record in iter_records(io.BytesIO("\n".join(lines).encode()))]
        examples = list(Renderer.load(folder).encode_examples(iter(records)))
        kept = [
            (line, example)
            for line, example in zip(lines, examples, strict=True)
            if isinstance(example, Example) and len(example.token_ids) <= MAX_LENGTH
        ]
        self.lines = [line for line, _ in kept]
        self.mean_length = sum(len(example.token_ids) for _, example in kept) / len(kept)

    def per_tokens(self, num_tokens: int) -> int:
        """How many rows have about as many tokens."""
        return max(1, round(num_tokens / self.mean_length))

    def write(self, path: Path, first: int, num_rows: int) -> None:
        """Some of them as JSONL."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(self.lines[first : first + num_rows]))


def make_material(storage: Storage) -> tuple[dict[str, BaseRef], Rows]:
    """What the benchmarks on a CPU train: both bases, and rows that fit them."""
    rows = chat_rows()[:3000]
    bases = make_bases(storage, rows)
    return bases, Rows(Path(storage.path(bases["8m"].key)), rows)
