"""Tiny random models, a byte tokenizer for them, and the real small models where they are present."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

REAL = Path(__file__).resolve().parents[2].parent / "shared" / "models"
VOCABULARY = 260

_HEADS = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 3, "max_position_embeddings": 128}
_ROTARY = {**_HEADS, "intermediate_size": 64, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_ROTARY),
    "llama-wide": LlamaConfig(**_ROTARY | {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "mistral-window": MistralConfig(**_ROTARY, sliding_window=9),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_positions=128, n_embd=32, n_layer=3, n_head=4),
    "mamba": MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, state_size=8),
    "gpt-neo-window": GPTNeoConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=7,
    ),
}

_LOCAL = ["sliding_attention", "sliding_attention", "full_attention"]
_OWN: dict[str, dict[str, object]] = {
    "gemma": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 9, "layer_types": _LOCAL, "query_pre_attn_scalar": 8},
    "qwen2": {"sliding_window": 9, "use_sliding_window": True, "layer_types": _LOCAL},
    "qwen3": {"head_dim": 16},
    "phi": {"num_key_value_heads": 4},
    "olmo": {"clip_qkv": 2.0},
    "starcoder2": {"sliding_window": 9},
    "gpt_neox": {"rotary_pct": 0.5, "num_key_value_heads": 4},
    "granite": {"residual_multiplier": 0.5, "logits_scaling": 2.0},
}
_ARCHITECTURES = (
    *("gemma", "gemma3_text", "qwen2", "qwen3", "smollm3", "phi", "phi3", "granite", "olmo", "olmo2", "starcoder2"),
    *("gpt_neox", "cohere"),
)
CONFIGS |= {
    name: AutoConfig.for_model(name, **{**_ROTARY, "pad_token_id": 0, **_OWN.get(name, {})}) for name in _ARCHITECTURES
}
FLAT = ("llama", "mistral-window", *_ARCHITECTURES)  # those of the fast path


def save_model(kind: str, folder: Path) -> Path:
    """A random model of a kind, in fp32. Its weights are large enough that greedy text is no constant."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
            elif name.endswith("bias"):  # zeros would hide what happens to them
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


def load_model(folder: Path) -> PreTrainedModel:
    """The same model, as transformers runs it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def byte_tokenizer() -> Tokenizer:
    """A byte-level BPE without merges: 256 bytes, then four special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: id for id, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|user|>", "<|bot|>", "<|pad|>"])
    return tokenizer
