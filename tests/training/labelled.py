"""Small real classifications for tests: tiny encoders with a WordPiece tokenizer, labelled rows, and specs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel

from tests.training.runs import BASE_KEY, make_spec
from training.artifact import Fingerprint, Manifest, commit, hash_files
from training.spec import BaseRef, ClassificationSpec, TrainSpec
from training.storage import Storage

WORDS = "the a cat dog bird runs sleeps sings is was very quite happy sad big small today never always at home".split()
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCAB_SIZE = 64
BERT: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LABELS = ("bird", "cat", "dog")


def write_encoder(folder: Path, model: dict[str, Any] = BERT) -> Path:
    """A random encoder as its makers publish it: without a label head, and without a chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {token: number for number, token in enumerate([*SPECIALS, *WORDS, *(f"##{c}" for c in "abcdefgh")])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **dict(zip(names, SPECIALS, strict=False))}
    config["model_max_length"] = 64
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    fields = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, **model}
    AutoModel.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields)).save_pretrained(folder)
    return folder


def make_encoder(storage: Storage, model: dict[str, Any] = BERT) -> BaseRef:
    """The same, committed like any base."""
    folder = write_encoder(Path(storage.path(BASE_KEY)), model)
    manifest = Manifest(
        kind="base",
        files=hash_files(storage, BASE_KEY, [file.name for file in folder.iterdir()]),
        base_id="tiny",
        base_content_hash="tiny",
        fingerprint=Fingerprint(chat_template="-", tokenizer="-", special_tokens="-", dtype="float32", adapter="none"),
    )
    commit(storage, BASE_KEY, manifest)
    return BaseRef(id="tiny", key=BASE_KEY, content_hash="tiny")


def labelled_rows(num_rows: int = 12, first: int = 0) -> list[dict[str, str]]:
    """Texts of different lengths whose label is the animal in them."""
    rows = []
    for i in range(first, first + num_rows):
        label = LABELS[i % 3]
        words = [WORDS[(i * 7 + k) % len(WORDS)] for k in range(i % 5)]
        kept = [word for word in words if word not in LABELS]
        rows.append({"text": " ".join(["the", *kept, label, WORDS[5 + i % 3], "today"]), "label": label})
    return rows


def write_labelled(storage: Storage, key: str, rows: list[dict[str, str]] | None = None) -> str:
    """Rows as a training file."""
    storage.write_bytes(key, "\n".join(map(json.dumps, labelled_rows() if rows is None else rows)).encode())
    return key


def make_labelled_spec(
    storage: Storage, base: BaseRef, lora: bool = False, settings: dict[str, Any] | None = None, **changes: Any
) -> TrainSpec:
    """A resolved spec over 12 labelled rows; `settings` are those of the method."""
    own = {"labels": LABELS, "label_counts": (4, 4, 4), "label_smoothing": 0.0} | (settings or {})
    fields = {
        "method": "classification",
        "classification": ClassificationSpec(**own),
        "training_key": write_labelled(storage, "files/labelled"),
        "max_length": 64,
    }
    return make_spec(storage, base, lora, **{**fields, **changes})
