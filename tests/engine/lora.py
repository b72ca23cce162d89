"""LoRA adapters made by PEFT, with random factors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel


def save_adapter(model: PreTrainedModel, folder: Path, *, seed: int, rank: int = 4, **options: Any) -> Path:
    """A PEFT adapter of the model whose effect on the text is large."""
    torch.manual_seed(1000 + seed)
    options = {"target_modules": "all-linear", "lora_alpha": 8, **options}
    peft_model = get_peft_model(model, LoraConfig(r=rank, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape))
            elif "lora_" in name:
                parameter.normal_(std=0.3)
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def merged(model: PreTrainedModel, folder: Path) -> Any:
    """The model with an adapter's product added to its weights, by PEFT."""
    return PeftModel.from_pretrained(model, folder).merge_and_unload().eval()
