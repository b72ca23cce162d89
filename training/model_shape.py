"""What a base's folder says about its model without loading it: architecture, sizes, parameters.

Reads config.json and the headers of the safetensors files only; no torch.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from training.pooling import read_pooling

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
}
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")
_MLP_KEYS = ("intermediate_size", "n_inner", "ffn_dim")
_HEAD_KEYS = ("num_attention_heads", "n_head", "num_heads")
LAYER_NAME = re.compile(r"\.(?:layers|layer|h|blocks)\.(\d+)\.")
_UNLIMITED = 10**9  # tokenizers write 10**30 for "no limit"

# Encoders that read a text from both sides, by model type. A test proves each, as it does the types of the next list.
ENCODERS = frozenset(
    {"bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert"}
    | {"modernbert", "albert", "deberta-v2", "mpnet"}
)
# Causal language models that transformers builds with a label head on the last token.
_CAUSAL_WITH_LABELS = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo2"}
    | {"starcoder2", "gpt_neo", "gpt_neox", "opt"}
)
_ENCODER_ENDINGS = ("Model", "ForMaskedLM", "ForPreTraining")
COUNT_FROM_PADDING = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet"})  # their first positions stay unused


class ShapeError(ValueError):
    """The folder does not describe a model that can be used; the message is for the user."""


class ModelShape:
    """One model folder's configuration and parameter shapes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / "config.json")

    @property
    def architecture(self) -> str:
        """The class that transformers would build."""
        names = self.config.get("architectures")
        return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""

    @property
    def model_type(self) -> str:
        """The family, in transformers' words."""
        name = self.config.get("model_type")
        return name if isinstance(name, str) else ""

    @property
    def is_causal(self) -> bool:
        """Whether it is a language model that continues a text."""
        return self.architecture.endswith(("ForCausalLM", "GPT2LMHeadModel"))

    @property
    def is_encoder(self) -> bool:
        """Whether it is an encoder, with or without the head of its pre-training (which is not used)."""
        is_known = self.model_type in ENCODERS and not self.config.get("is_decoder")
        has_such_a_head = self.architecture.endswith(_ENCODER_ENDINGS) and not self.architecture.endswith("LMHeadModel")
        return is_known and has_such_a_head

    def methods(self) -> tuple[str, ...]:
        """The methods by which it can be fine-tuned."""
        if self.is_encoder:
            return ("classification", "embedding")
        if not self.is_causal:
            return ()
        labels = ("classification",) if self.model_type in _CAUSAL_WITH_LABELS else ()
        return ("supervised", "dpo", *labels)

    @property
    def hidden_size(self) -> int:
        """The model's width."""
        return self._number("hidden_size", "n_embd", "d_model", "dim")

    @property
    def num_layers(self) -> int:
        """Transformer blocks."""
        return self._number("num_hidden_layers", "n_layer", "num_layers", "n_layers")

    @property
    def mlp_size(self) -> int:
        """Width of the feed-forward layers; four times the model's where the configuration does not say."""
        named = next((self.config[key] for key in _MLP_KEYS if isinstance(self.config.get(key), int)), None)
        return 4 * self.hidden_size if named is None else int(named)

    @property
    def has_gates(self) -> bool:
        """Whether an MLP has a third matrix, the gate, maybe stored as one with another; assumed unless there are just
        two of them in each layer."""
        sizes = (self.mlp_size, 2 * self.mlp_size)
        inside = (s for name, s in self.linear_weights().items() if LAYER_NAME.search(f".{name}") and max(s) in sizes)
        return sum(map(_product, inside)) != 2 * self.num_layers * self.hidden_size * self.mlp_size

    @property
    def kv_size(self) -> int:
        """Width of a layer's keys: of its key/value heads together."""
        heads = next((self.config[key] for key in _HEAD_KEYS if isinstance(self.config.get(key), int)), 1)
        kv_heads, head_dim = self.config.get("num_key_value_heads"), self.config.get("head_dim")
        return int(kv_heads or heads) * int(head_dim or self.hidden_size // heads)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self._number("vocab_size")

    @property
    def max_context(self) -> int:
        """Most tokens of one sequence: what the positions allow, and not more than the tokenizer's own limit."""
        limits = [self.config[key] for key in _CONTEXT_KEYS if isinstance(self.config.get(key), int)][:1]
        if limits and self.model_type in COUNT_FROM_PADDING:
            limits[0] -= int(self.config.get("pad_token_id", 1)) + 1
        tokenizer_limit = read_json(self.folder / "tokenizer_config.json", missing_ok=True).get("model_max_length")
        if isinstance(tokenizer_limit, int | float) and 0 < tokenizer_limit < _UNLIMITED:
            limits.append(int(tokenizer_limit))
        if not limits:
            raise ShapeError("config.json does not tell the context length (max_position_embeddings)")
        return min(limits)

    def longest(self, method: str) -> int:
        """Most tokens that a method's texts may have: embeddings may have a limit of their own."""
        own = read_pooling(self.folder).max_length if method == "embedding" else None
        return self.max_context if own is None else min(self.max_context, own)

    def weight_files(self) -> list[str]:
        """Names of the safetensors files that hold the weights, as transformers would choose them."""
        if (self.folder / INDEX).exists():
            mapping = read_json(self.folder / INDEX).get("weight_map")
            if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
                raise ShapeError(f"{INDEX} has no weight_map")
            return sorted(set(mapping.values()))
        return [SINGLE]

    @cached_property
    def _header(self) -> dict[str, tuple[tuple[int, ...], str]]:
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for name in self.weight_files():
            try:
                with safe_open(str(self.folder / name), framework="numpy") as file:
                    for key in file.keys():  # noqa: SIM118 - not a dict
                        tensor = file.get_slice(key)
                        found[key] = (tuple(tensor.get_shape()), tensor.get_dtype())
            except (OSError, SafetensorError) as error:
                raise ShapeError(f"{name} is not a whole safetensors file: {error}") from error
        return found

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter by name."""
        return {name: shape for name, (shape, _) in self._header.items()}

    @property
    def num_parameters(self) -> int:
        """Stored numbers; tied weights are stored once."""
        return sum(_product(shape) for shape in self.parameters.values())

    @property
    def num_layer_parameters(self) -> int:
        """Those of the transformer blocks, by their numbered names."""
        return sum(_product(shape) for name, shape in self.parameters.items() if LAYER_NAME.search(f".{name}"))

    @property
    def weights_bytes(self) -> int:
        """Size of the weights as stored."""
        return sum(_product(shape) * _BYTES.get(dtype, 4) for shape, dtype in self._header.values())

    @property
    def dtype(self) -> str:
        """The type of most stored numbers, in torch's words."""
        totals: dict[str, int] = {}
        for shape, dtype in self._header.values():
            totals[dtype] = totals.get(dtype, 0) + _product(shape)
        most = max(sorted(totals), key=lambda name: totals[name])
        return _DTYPES.get(most, most.lower())

    def linear_weights(self) -> dict[str, tuple[int, ...]]:
        """Matrices of the linear layers by module name: two-dimensional weights but embeddings and the heads of
        pre-training, which is what "all-linear" means in PEFT."""
        outside = ("embed", "wte", "wpe", "lm_head", "embed_out", "cls.", "predictions", "vocab_")
        return {
            name.removesuffix(".weight"): shape
            for name, shape in self.parameters.items()
            if len(shape) == 2 and name.endswith(".weight") and not any(part in name for part in outside)
        }

    def adapted(self, targets: str | tuple[str, ...]) -> dict[str, tuple[int, ...]]:
        """The linear layers that LoRA targets name, by a module's full name or its last parts, as PEFT matches them."""
        layers = self.linear_weights()
        if isinstance(targets, str):
            return layers
        return {
            name: shape for name, shape in layers.items() if any(name == t or name.endswith("." + t) for t in targets)
        }

    def is_read_past(self, layer: str) -> bool:
        """Whether the model's code may take a linear layer's weight without calling the layer, as that of state-space
        blocks (Mamba) does; each of them holds a parameter D beside its layers."""
        return f"{layer.rpartition('.')[0]}.D" in self.parameters

    def _number(self, *keys: str) -> int:
        for key in keys:
            if isinstance(self.config.get(key), int):
                return int(self.config[key])
        raise ShapeError(f"config.json lacks {keys[0]}")


def is_known(architecture: str) -> bool:
    """Whether the installed transformers has this class; asked by name, so nothing of torch is imported."""
    return architecture in import_module("transformers").__all__  # `dir` takes a tenth of a second


def read_json(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    """A JSON object from a file; ShapeError if it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if missing_ok:
            return {}
        raise ShapeError(f"{path.name} is missing") from None
    except ValueError as error:
        raise ShapeError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ShapeError(f"{path.name} is not a JSON object")
    return value


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
