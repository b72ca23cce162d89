"""Attention over packed examples: each example sees itself only, and no T x T mask is ever built.

Registered with transformers under `PACKED`. Models outside `PACKED_MODEL_TYPES` (other attention code, soft caps,
sinks, recurrent layers) are run on right-padded batches instead; see `training.model`.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PACKED = "tunesmith_packed"

# Model types whose every layer mixes tokens only through the attention interface, plain or with a sliding window.
# A test proves for each of them that packing changes neither loss nor gradients.
PACKED_MODEL_TYPES = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma3_text", "phi3", "granite", "olmo2", "starcoder2"}
)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    example_lengths: tuple[int, ...] = (),
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each example of one packed row, causal unless the module says that it is not; tensors are
    [1, heads, tokens, head_dim]."""
    assert query.shape[0] == 1 and query.shape[2] == sum(example_lengths), "a packed row needs its examples' lengths"
    causal = getattr(module, "is_causal", True)
    runs = [(length, len(list(same))) for length, same in groupby(example_lengths)]
    sizes = [length * count for length, count in runs]
    outputs = []
    for (length, count), *parts in zip(runs, *(x[0].split(sizes, dim=1) for x in (query, key, value)), strict=True):
        q, k, v = (part.unflatten(1, (count, length)).transpose(0, 1) for part in parts)  # [count, heads, length, dim]
        band = _band(length, sliding_window, query.device)
        is_causal = causal and band is None
        out = scaled_dot_product_attention(
            q, k, v, band, dropout, is_causal=is_causal, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # [tokens, heads, dim]
    return torch.cat(outputs).unsqueeze(0), None


def _band(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """Mask of a sliding window, or None while the whole example fits in it."""
    if sliding_window is None or length <= sliding_window:
        return None
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < sliding_window)


def _no_mask(*_: Any, **__: Any) -> None:
    """Packed attention knows the borders from the lengths."""


ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED, _no_mask)
