"""What training is measured on: random models of two sizes with one tokenizer, and real chat and preference rows."""

from __future__ import annotations

import io
import json
import math
import random
import shutil
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.shared import DATA
from tests.training.runs import SPECIALS, write_model
from training.artifact import Fingerprint, Manifest, commit, hash_files
from training.batches import Batches
from training.records import iter_records, sequences_of
from training.render import Example, Renderer
from training.spec import BaseRef, TrainSpec
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
    lines = (DATA / "gsm8k/train.jsonl").read_text().splitlines()
    rows = alpaca_rows() + [_chat(row["question"], row["answer"]) for row in map(json.loads, lines)]
    random.Random(0).shuffle(rows)
    return rows


def alpaca_rows() -> list[dict[str, Any]]:
    """Instructions and answers, in the order of their file."""
    rows = json.loads((DATA / "llamafactory/alpaca_en_demo.json").read_text())
    return [_chat(f"{row['instruction']}\n{row['input']}".strip(), row["output"]) for row in rows]


def _chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def preference_rows() -> list[dict[str, Any]]:
    """Conversations with two answers each, in OpenAI's shape."""
    rows = json.loads((DATA / "llamafactory/dpo_en_demo.json").read_text())
    return [
        {
            "input": {"messages": [_message(turn) for turn in row["conversations"]]},
            "preferred_output": [_message(row["chosen"])],
            "non_preferred_output": [_message(row["rejected"])],
        }
        for row in rows
    ]


_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def _message(turn: dict[str, str]) -> dict[str, str]:
    return {"role": _ROLES[turn["from"]], "content": turn["value"]}


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
    return _commit_base(storage, key, size, dtype)


def copy_base(storage: Storage, source: Path) -> BaseRef:
    """A model folder without a chat template, committed under its name with ours."""
    key = f"bases/{source.name}"
    folder = Path(storage.path(key))
    folder.mkdir(parents=True)
    for file in source.iterdir():
        shutil.copyfile(file, folder / file.name)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return _commit_base(storage, key, source.name, torch.float32)


def _commit_base(storage: Storage, key: str, name: str, dtype: torch.dtype) -> BaseRef:
    stored = str(dtype).removeprefix("torch.")
    fingerprint = Fingerprint(chat_template="-", tokenizer="-", special_tokens="-", dtype=stored, adapter="none")
    files = hash_files(storage, key, [file.name for file in Path(storage.path(key)).iterdir()])
    manifest = Manifest(kind="base", files=files, base_id=name, base_content_hash=name, fingerprint=fingerprint)
    commit(storage, key, manifest)
    return BaseRef(id=name, key=key, content_hash=name)


class Rows:
    """The rows that fit, with their lengths; both sides of a preference must."""

    def __init__(self, folder: Path, rows: list[dict[str, Any]], max_length: int = MAX_LENGTH) -> None:
        lines = [json.dumps(row) for row in rows]
        records = iter_records(io.BytesIO("\n".join(lines).encode()))
        sequences = [sequences_of(record) for _, record in records]
        examples = Renderer.load(folder).encode_examples(chain.from_iterable(sequences))
        self.lines: list[str] = []
        num_tokens = 0
        for line, parts in zip(lines, sequences, strict=True):
            lengths = [_length(example) for example in islice(examples, len(parts))]
            if max(lengths) <= max_length:
                self.lines.append(line)
                num_tokens += int(sum(lengths))
        self.mean_length = num_tokens / len(self.lines)

    def per_tokens(self, num_tokens: int) -> int:
        """How many rows have about as many tokens."""
        return max(1, round(num_tokens / self.mean_length))

    def write(self, path: Path, first: int, num_rows: int) -> None:
        """Some of them as JSONL."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(self.lines[first : first + num_rows]))


def _length(example: Example | Exception) -> float:
    return len(example.token_ids) if isinstance(example, Example) else math.inf


def write_in_order(spec: TrainSpec, storage: Storage, path: Path) -> None:
    """The rows of a training file in the order in which our loop takes them in its first epoch."""
    lines = Path(storage.path(spec.training_key)).read_text().splitlines()
    batches = Batches(lines, batch_size=spec.hyperparameters.batch_size, n_epochs=1, seed=spec.seed)
    steps = range(1, batches.total_steps + 1)
    path.write_text("\n".join(lines[index] for step in steps for index in batches.indices(step)))


def make_material(storage: Storage) -> tuple[dict[str, BaseRef], Rows]:
    """What the benchmarks on a CPU train: both bases, and rows that fit them."""
    rows = chat_rows()[:3000]
    bases = make_bases(storage, rows)
    return bases, Rows(Path(storage.path(bases["8m"].key)), rows)
