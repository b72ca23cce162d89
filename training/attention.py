"""Attention over packed examples: each example sees itself only, and no T x T mask is ever built.

Registered with transformers under `PACKED`. Models outside `PACKED_MODEL_TYPES` (other attention code, soft caps,
sinks, recurrent layers) are run on right-padded batches instead; see `training.model`. On a CPU, short sequences go
through `training.short_attention`; all others through torch's own attention, one call for each run of equal lengths.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from training.short_attention import MAX_SHORT, View, short_attention

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
    [1, heads, tokens, head_dim], the result is [1, tokens, heads, head_dim]. Lengths descend."""
    assert query.shape[0] == 1 and query.shape[2] == sum(example_lengths), "a packed row needs its examples' lengths"
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True)
    knows_short = query.device.type == "cpu" and (causal or sliding_window is None)
    num_long = sum(length > MAX_SHORT for length in example_lengths) if knows_short else len(example_lengths)
    long, short = example_lengths[:num_long], example_lengths[num_long:]
    outputs, border = [], sum(long)
    tensors = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]  # [tokens, heads, head_dim]
    if long:
        q, k, v = (x[:border].transpose(0, 1) for x in tensors)
        outputs.append(_long_attention(q, k, v, long, scale, dropout, sliding_window, causal).transpose(0, 1))
    if short:
        q, k, v = (x[border:] for x in tensors) if long else tensors  # the gradient of a slice is a copy
        outputs.append(short_attention(q, k, v, short, View(scale, causal, sliding_window, dropout)))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None], None


def _long_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: tuple[int, ...],
    scale: float,
    dropout: float,
    sliding_window: int | None,
    causal: bool,
) -> torch.Tensor:
    """[heads, tokens, head_dim] from the same, with key and value of perhaps fewer heads."""
    runs = [(length, len(list(same))) for length, same in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    outputs = []
    for (length, count), *parts in zip(runs, *(x.split(sizes, dim=1) for x in (query, key, value)), strict=True):
        q, k, v = (part.unflatten(1, (count, length)).transpose(0, 1) for part in parts)  # [count, heads, length, dim]
        band = _band(length, sliding_window, query.device)
        is_causal = causal and band is None
        out = scaled_dot_product_attention(
            q, k, v, band, dropout, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(out.transpose(0, 1).flatten(1, 2))
    return torch.cat(outputs, dim=1)


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

# On recent GPUs torch would prefer cuDNN's attention, which builds a plan, for tens of milliseconds, for each new
# shape: here every length and count of equal ones is a shape of its own.
torch.backends.cuda.enable_cudnn_sdp(False)
