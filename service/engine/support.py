"""Which models the native engine runs adapters on, told from their configuration, before anything is loaded. No torch.

The engine itself looks again when it loads a model (`native/runner.py`); this is for telling somebody before training.
"""

from __future__ import annotations

from typing import Any

# Model types whose layers keep more than keys and values per token (recurrent, convolutional, shared or compressed
# states): there each sequence runs by itself, and without adapters. A test compares the list with what transformers
# would allocate for each of them.
STATEFUL_MODEL_TYPES = frozenset(
    {
        *("axk2", "bailing_hybrid", "bamba", "deepseek_v32", "dots3_note", "dots3_note_text", "falcon_h1"),
        *("falcon_mamba", "gemma3n", "gemma3n_text", "glm_moe_dsa", "granitemoehybrid", "hy_v4", "inkling2_text"),
        *("inkling_text", "jamba", "kimi_linear", "lfm3", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid"),
        *("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen4_exp", "qwen4_exp_text"),
        *("recurrent_gemma", "zamba", "zamba2", "zaya", "deepseek_v4"),
    }
)


def why_no_adapter(config: dict[str, Any]) -> str | None:
    """Why an adapter on a base with this config.json would be refused; None if nothing speaks against it."""
    model_type = config.get("model_type")
    if model_type in STATEFUL_MODEL_TYPES:
        return f"the engine runs no adapters on {model_type} models; a full fine-tune would be served"
    return None
