"""Tiny random encoders in real folders: BERT with a WordPiece tokenizer, as a classifier or for embeddings."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, BertModel

LABELS = ("billing", "praise", "technical")
CONTEXT = 64
_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_WORDS = (
    "the a my was is it bill card charged twice app crashes slow error love great thanks refund not working".split()
)
WIDTH = 32


def tokenizer() -> Tokenizer:
    """Whole words where they are known, single letters elsewhere; [CLS] in front and [SEP] behind."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*_SPECIALS, *_WORDS, *letters[1:], *(f"##{letter}" for letter in letters), *"0123456789.,!?'"]
    made = Tokenizer(models.WordPiece({piece: id for id, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(_SPECIALS)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return made


def bert_config(labels: tuple[str, ...] = LABELS, initializer_range: float = 0.4) -> BertConfig:
    """Small, with weights far enough from zero for a random head to tell texts apart."""
    return BertConfig(
        vocab_size=tokenizer().get_vocab_size(),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=initializer_range,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )


def save_classifier(folder: Path, labels: tuple[str, ...] = LABELS, temperature: float | None = None) -> Path:
    """A classifier as fine-tuning leaves it."""
    torch.manual_seed(5)
    BertForSequenceClassification(bert_config(labels)).save_pretrained(folder)
    if temperature is not None:
        (folder / "evaluation.json").write_text(json.dumps({"temperature": temperature}))
    return save_tokenizer(folder)


def save_encoder(folder: Path, *, pooling: str | None = None, normalize: bool = True) -> Path:
    """An encoder that can learn; with `pooling`, in sentence-transformers' layout."""
    torch.manual_seed(5)
    BertModel(bert_config(initializer_range=0.02)).save_pretrained(folder)
    if pooling is not None:
        steps = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
        modules = [
            {
                "idx": i,
                "name": str(i),
                "path": f"{i}_{kind}" if i else "",
                "type": f"sentence_transformers.models.{kind}",
            }
            for i, kind in enumerate(steps)
        ]
        (folder / "modules.json").write_text(json.dumps(modules))
        (folder / "1_Pooling").mkdir()
        flags = {f"pooling_mode_{name}": name == pooling for name in ("cls_token", "mean_tokens", "max_tokens")}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": WIDTH, **flags}))
    return save_tokenizer(folder)


def save_tokenizer(folder: Path) -> Path:
    """Tokenizer files beside the weights."""
    tokenizer().save(str(folder / "tokenizer.json"))
    named = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT, **named}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def ids_of(text: str) -> tuple[int, ...]:
    """What a model reads of a text."""
    return tuple(tokenizer().encode(text).ids)


@torch.no_grad()
def probabilities(folder: Path, text: str) -> list[float]:
    """As transformers computes them, one text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found: list[float] = model(torch.tensor([ids_of(text)])).logits[0].softmax(dim=-1).tolist()
    return found
