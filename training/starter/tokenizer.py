"""The starter's tokenizer: byte-level BPE trained on its corpus, with ChatML-like turns.

Byte-level, so that any text can be encoded; digits stay single, which makes numbers easy to copy.
Imports `tokenizers` only; the files it writes are what `training.render` and transformers load.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from training.starter.corpus import Chat, Document

PAD = "<|endoftext|>"
START = "<|im_start|>"
END = "<|im_end|>"
CONTEXT = 512


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> Tokenizer:
    """A BPE vocabulary of exactly `vocab_size` entries or fewer; ids 0–2 are the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for document in documents for text in _texts(document)), trainer)
    return tokenizer


def _texts(document: Document) -> Iterable[str]:
    return [document] if isinstance(document, str) else [message["content"] for message in document]


def encode(tokenizer: Tokenizer, document: Document) -> tuple[list[int], list[bool]]:
    """Token ids and, for each, whether it is speech: a text's words, or what the assistant says up to its end token."""
    if isinstance(document, str):
        ids = tokenizer.encode(document + PAD).ids
        return ids, [True] * len(ids)
    ids, speech = [], []
    for message in document:
        for text, said in _turn(message):
            piece = tokenizer.encode(text).ids
            ids += piece
            speech += [said and message["role"] == "assistant"] * len(piece)
    return ids, speech


def _turn(message: dict[str, str]) -> tuple[tuple[str, bool], ...]:
    return (f"{START}{message['role']}\n", False), (message["content"] + END, True), ("\n", False)


def chat_text(chat: Chat) -> str:
    """The chat template's result for plain turns, without the cost of the template engine (a test compares them)."""
    return "".join(text for message in chat for text, _ in _turn(message))


def chat_template() -> str:
    """The Jinja source, with generation markers around what the assistant says, its end token included."""
    return resources.files("training.starter").joinpath("chat_template.jinja").read_text(encoding="utf-8")


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(chat_template(), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": END,
        "additional_special_tokens": [START],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
