"""Decode attention for grouped key/value heads: the query heads of a group as rows of one small matrix product.

Without a mask, transformers asks `scaled_dot_product_attention` for grouped heads (`enable_gqa`), which on a CPU is an
order of magnitude slower than the same product with the group laid out as query rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "sdpa_grouped_decode"


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    num_rows, num_heads, num_queries, _ = query.shape
    num_kv_heads = key.shape[1]
    shared_mask = attention_mask is None or attention_mask.shape[1] == 1
    if num_queries != 1 or num_kv_heads == num_heads or not shared_mask or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    grouped = query.view(num_rows, num_kv_heads, num_heads // num_kv_heads, query.shape[3])
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(num_rows, 1, num_heads, value.shape[3]), None


def install(model: PreTrainedModel) -> None:
    """Use it in a model that runs on transformers' SDPA; others keep what they have."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_NAME, _attention)
        AttentionMaskInterface.register(_NAME, sdpa_mask)
        model.set_attn_implementation(_NAME)
