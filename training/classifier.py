"""Models with a label head: loading one from a base folder, and the logits of a micro-batch.

The head is the one that transformers builds for the architecture: on the first token of an encoder, on the last token
of a causal language model. Texts are read without padding where the architecture allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import relu
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from training.attention import PACKED, PACKED_MODEL_TYPES
from training.failure import Failure
from training.model_shape import COUNT_FROM_PADDING
from training.pretrained import load_pretrained
from training.render import Renderer
from training.rows import packed_row, padded_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from training.batches import MicroBatch


def load_classifier(
    folder: Path, labels: tuple[str, ...], seed: int, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The base with a new head for `labels`, and the names of the modules that are new. The same seed gives the same
    new weights everywhere. Failure if the base lacks weights of its own."""
    torch.manual_seed(seed)
    auto, named = AutoModelForSequenceClassification, label_config(labels)
    with _no_load_report():
        model, missing = load_pretrained(auto, folder, dtype, device, packed_types=PACKED_TYPES, **named)
    model.config.use_cache = False
    if model.config.pad_token_id is None:
        model.config.pad_token_id = _padding(folder)
    return model, _new_heads(model, missing)


@contextmanager
def _no_load_report() -> Iterator[None]:
    """transformers warns of a head without weights; here that is how it should be."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def label_config(labels: tuple[str, ...]) -> dict[str, Any]:
    """What a model's configuration says of its labels, in transformers' words."""
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
        "problem_type": "single_label_classification",
    }


def _padding(folder: Path) -> int | None:
    """The token that stands for nothing, so that transformers can read the artifact's batches."""
    renderer = Renderer.load(folder)
    pad = renderer.special_tokens.get("pad_token")
    return renderer.tokenizer.token_to_id(pad) if pad else renderer.eos_token_id


def _new_heads(model: PreTrainedModel, missing: set[str]) -> tuple[str, ...]:
    """Modules behind the base's own that it has no weights for; a pooler often is one of them."""
    own = f"{model.base_model_prefix}."
    new = tuple(name for name in _new_modules(model, missing) if not name.startswith(own) or name.endswith(".pooler"))
    lost = [key for key in sorted(missing) if not key.startswith(tuple(f"{name}." for name in new))]
    if lost:
        raise Failure("invalid_base_model", f"The base model has no weights for {lost[0]}.", "model")
    return new


def _new_modules(model: PreTrainedModel, missing: set[str]) -> Iterator[str]:
    """The outermost modules all of whose weights are missing in the base."""
    found = ""
    for name, module in model.named_modules():
        parameters = [f"{name}.{parameter}" for parameter, _ in module.named_parameters()]
        is_new = bool(parameters) and missing.issuperset(parameters)
        if is_new and not (found and name.startswith(f"{found}.")):
            found = name
            yield name


# -- logits ------------------------------------------------------------------------------------------------------------


def label_logits(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """Logits [examples, labels], in the order of the examples."""
    is_packed = model.config._attn_implementation == PACKED
    logits = _packed_logits(model, batch) if is_packed else _padded_logits(model, batch)
    return logits[list(batch.places)]


def _packed_logits(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """All texts in one row, kept apart by attention and by their positions."""
    row = packed_row(batch)
    lengths = torch.tensor(batch.lengths, device=row.input_ids.device)
    ends = lengths.cumsum(0)
    hidden = model.base_model(
        input_ids=row.input_ids,
        position_ids=row.positions + first_position(model),
        example_lengths=row.lengths,
        **({"use_cache": False} if _is_causal(model) else {}),
    ).last_hidden_state[0]
    if _is_causal(model):
        return _score(model)(hidden[ends - 1])
    return _HEADS[model.config.model_type](model, hidden[ends - lengths][:, None])


def _padded_logits(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor:
    """Texts of similar lengths together, padded on the right."""
    logits = []
    for rows in padded_rows(batch, model.config.pad_token_id or 0):
        if _is_causal(model):
            found = model.base_model(input_ids=rows.input_ids, attention_mask=rows.mask, use_cache=False)
            last = [states[length - 1] for states, length in zip(found.last_hidden_state, rows.lengths, strict=True)]
            logits.append(_score(model)(torch.stack(last)))
        else:
            logits.append(model(input_ids=rows.input_ids, attention_mask=rows.mask).logits)
    return torch.cat(logits)


def _is_causal(model: PreTrainedModel) -> bool:
    return hasattr(model, "score")  # transformers' name for the head on a last token


def _score(model: PreTrainedModel) -> torch.nn.Module:
    return model.get_submodule("score")


def first_position(model: PreTrainedModel) -> int:
    """RoBERTa and its kin count positions from behind the padding's."""
    return model.config.pad_token_id + 1 if model.config.model_type in COUNT_FROM_PADDING else 0


def _bert_head(model: Any, first: torch.Tensor) -> torch.Tensor:
    return model.classifier(model.dropout(model.bert.pooler(first)))


def _distilbert_head(model: Any, first: torch.Tensor) -> torch.Tensor:
    return model.classifier(model.dropout(relu(model.pre_classifier(first[:, 0]))))


def _roberta_head(model: Any, first: torch.Tensor) -> torch.Tensor:
    return model.classifier(first)


# Encoders that are packed, and how each makes logits of the first tokens [texts, 1, width].
_HEADS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "bert": _bert_head,
    "distilbert": _distilbert_head,
    "roberta": _roberta_head,
    "xlm-roberta": _roberta_head,
    "camembert": _roberta_head,
    "electra": _roberta_head,
}
PACKED_TYPES = PACKED_MODEL_TYPES.union(_HEADS)
