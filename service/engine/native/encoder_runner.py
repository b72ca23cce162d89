"""Forward passes of an encoder or a classifier: token ids to log-probabilities of labels, or to embeddings.

Used from the engine's thread only. An adapter is merged into its base while loading: a replica serves one model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import normalize
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from service.engine.native.adapters import PREFIX, gain_of, merged_rows, scale_of
from service.engine.protocol import AdapterMismatch
from training.artifact import REPORT_FILE, BrokenFolder
from training.pooling import Pooling, read_pooling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16}
_UNSUPPORTED = ("lora_bias", "use_qalora")
_CPU_BATCH_TOKENS = 2048  # padding included; more makes nothing faster, and whoever comes next waits for it
_GPU_BATCH_TOKENS = 32768


class EncoderRunner:
    """A loaded model. Calling it with sequences of token ids gives float32 [sequences, labels or width]."""

    def __init__(
        self,
        folder: Path,
        *,
        task: Literal["classify", "embed"],
        adapter: Path | None = None,
        dtype: Literal["auto", "fp32", "bf16"] = "auto",
        num_threads: int | None = None,
    ) -> None:
        """`adapter` is a LoRA folder of the PEFT layout for the weights in `folder`; AdapterMismatch if it does not
        fit, BrokenFolder if weights are missing in both. What the model says of itself (labels, temperature, pooling)
        is read from the fine-tune, not its base."""
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        transformers_logging.disable_progress_bar()
        own = adapter or folder
        config = AutoConfig.from_pretrained(own if (own / "config.json").is_file() else folder, local_files_only=True)
        auto: Any = AutoModelForSequenceClassification if task == "classify" else AutoModel
        model: PreTrainedModel
        model, info = auto.from_pretrained(
            folder,
            config=config,
            dtype=_DTYPES[dtype],
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
        lost = set(info["missing_keys"]) - (merge_adapter(model, adapter) if adapter is not None else set())
        if lost := {name for name in lost if not (task == "embed" and name.startswith("pooler."))}:
            raise BrokenFolder(f"{folder.name}: no weights for {min(lost)}")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_tokens = _GPU_BATCH_TOKENS if self.device.type == "cuda" else _CPU_BATCH_TOKENS
        nn.Module.to(model, self.device)
        self._model = model.eval()
        self._pad_id = int(config.pad_token_id or 0)
        self.vocab_size = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
        self.labels = _labels(config) if task == "classify" else ()
        self._temperature = _temperature(own)
        self._pooling = read_pooling(own) if task == "embed" else Pooling()
        self.max_context = min(_positions(model), self._pooling.max_length or _positions(model))

    @torch.inference_mode()
    def __call__(self, sequences: Sequence[tuple[int, ...]]) -> np.ndarray:
        """Rows in the order of the sequences: log-probabilities of the labels, or embeddings. None may be empty."""
        lengths = torch.tensor([len(ids) for ids in sequences], device=self.device)
        padded = torch.full((len(sequences), int(lengths.max())), self._pad_id)
        for row, ids in zip(padded, sequences, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        mask = torch.arange(padded.shape[1], device=self.device)[None] < lengths[:, None]
        inputs = {"input_ids": padded.to(self.device), "attention_mask": mask.long()}
        if self.labels:
            logits = self._logits(inputs, lengths).float() / self._temperature
            found = logits.log_softmax(dim=-1)
        else:
            found = pool(self._model(**inputs).last_hidden_state.float(), mask, self._pooling)
        return found.cpu().numpy()

    def _logits(self, inputs: dict[str, torch.Tensor], lengths: torch.Tensor) -> torch.Tensor:
        """Of a causal model's label head (`score`) on each sequence's last token, which transformers would look for by
        the padding token that such models often lack; of an encoder's own head otherwise."""
        head = getattr(self._model, "score", None)
        if head is None:
            return cast(torch.Tensor, self._model(**inputs).logits)
        states = self._model.base_model(**inputs, use_cache=False).last_hidden_state
        rows = torch.arange(len(lengths), device=lengths.device)
        return cast(torch.Tensor, head(states[rows, lengths - 1]))


def pool(states: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Embeddings [sequences, width] of token states [sequences, tokens, width]; `mask` is true at real tokens."""
    if pooling.mode == "cls":
        found = states[:, 0]
    elif pooling.mode == "max":
        found = states.masked_fill(~mask[..., None], -math.inf).amax(dim=1)
    else:
        found = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    return normalize(found, dim=-1) if pooling.normalize else found


@torch.no_grad()
def merge_adapter(model: nn.Module, folder: Path) -> set[str]:
    """Put a LoRA, rsLoRA or DoRA adapter into the weights that it adapts, and what it saved whole, such as a label
    head, into their place; returns the names of the latter. The sums are made in fp32."""
    config = json.loads((folder / "adapter_config.json").read_text())
    unknown = [name for name in _UNSUPPORTED if config.get(name)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unknown:
        raise AdapterMismatch(f"the adapter uses {', '.join(unknown) or 'another method than LoRA'}")
    weights, whole = load_file(folder / "adapter_model.safetensors"), set()
    for key, value in weights.items():
        name = key.removeprefix(PREFIX)
        if name.endswith((".lora_B.weight", ".lora_magnitude_vector")):
            continue
        try:
            if name.endswith(".lora_A.weight"):
                _merge_layer(model, name.removesuffix(".lora_A.weight"), weights, config)
            else:
                target = model.get_parameter(name)
                target.copy_(value.view_as(target))
                whole.add(name)
        except (AttributeError, KeyError, RuntimeError) as error:
            raise AdapterMismatch(f"the adapter's {key} does not fit its base: {error}") from error
    return whole


def _merge_layer(model: nn.Module, name: str, weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    layer = model.get_submodule(name)
    weight = cast(torch.Tensor, layer.weight)
    rows = weight.T if isinstance(layer, Conv1D) else weight
    a, b = (weights[f"{PREFIX}{name}.lora_{side}.weight"] for side in "AB")
    merged = merged_rows(rows, a, b, scale_of(name, a.shape[0], config))
    if config.get("use_dora"):
        merged *= gain_of(merged, weights[f"{PREFIX}{name}.lora_magnitude_vector"])[:, None]
    rows.copy_(merged)


def _labels(config: Any) -> tuple[str, ...]:
    return tuple(str(config.id2label[number]) for number in range(config.num_labels))


def _temperature(folder: Path) -> float:
    """What calibration on the validation set found; 1 where there was none (Guo et al. 2017)."""
    path = folder / REPORT_FILE
    found = json.loads(path.read_text()).get("temperature") if path.is_file() else None
    return float(found) if isinstance(found, int | float) and found > 0 else 1.0


def _positions(model: nn.Module) -> int:
    """Most tokens that the position embeddings allow; those that count from the padding id (RoBERTa) have fewer."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
            padding = module.padding_idx
            return module.num_embeddings - (0 if padding is None else padding + 1)
    return int(getattr(model.config, "max_position_embeddings", 0) or 1 << 20)
