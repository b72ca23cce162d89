"""Decoder layers of the Llama family as few large products: q, k and v in one, gate and up in one.

transformers' own layers run as well, through `flat_attention`; they take twice the time per layer at small batches,
most of it for starting small kernels. `fuse` replaces those whose formula is known to be this one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from service.engine.native.cpu_layer import LayerKernel
from service.engine.native.flat_attention import AttentionPlan
from service.engine.native.linear import FusedLinear
from service.engine.native.lora import AdapterStack

# Decoder layers of transformers that compute x + o(attention(rope(norm(qkv(norm x))))), then x + down(act(gate) up).
FUSED = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"})


class FusedLayer(nn.Module):
    """One decoder layer; same inputs and output as transformers'."""

    def __init__(self, layer: Any, name: str, stack: AdapterStack) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp

        def group(parent: nn.Module, path: str, *members: str) -> FusedLinear:
            layers = [getattr(parent, member) for member in members]
            return FusedLinear(layers, [f"{name}.{path}.{member}" for member in members], stack)

        self._qkv = group(attention, "self_attn", "q_proj", "k_proj", "v_proj")
        self._o = group(attention, "self_attn", "o_proj")
        self._gate_up = group(mlp, "mlp", "gate_proj", "up_proj")
        self._down = group(mlp, "mlp", "down_proj")
        self._activation = mlp.act_fn
        self._is_silu = attention.config.hidden_act == "silu"
        self._index, self._scale = attention.layer_idx, attention.scaling
        self._window: int | None = getattr(attention, "sliding_window", _window_of_all_layers(attention))
        self._head_size: int = attention.head_dim
        self._num_heads = attention.q_proj.out_features // self._head_size
        self._num_kv_heads = attention.k_proj.out_features // self._head_size
        self._norm, self._mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self._qk_norm = _qk_norm(attention, self._num_heads, self._num_kv_heads)
        self._stack = stack
        self.kernel = self._kernel_of_all()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        plan: AttentionPlan,
        **_: Any,
    ) -> torch.Tensor:
        """[1, tokens, width] from the same, perhaps in place."""
        x, (cosine, sine) = hidden_states[0], position_embeddings
        if (kernel := self.kernel) is not None:
            if "step" not in plan.shared:  # this is the first layer
                plan.shared["step"] = kernel.prepare(x, (cosine[0], sine[0]), plan.parts, self._stack.plan)
            if (step := plan.shared["step"]) is not None:
                kernel(step)
                return hidden_states
        return self._by_torch(x, position_embeddings, plan)[None]

    def _by_torch(
        self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], plan: AttentionPlan
    ) -> torch.Tensor:
        """[tokens, width] from the same."""
        qkv = self._qkv(_rms_norm(x, self._norm)).view(len(x), -1, self._head_size)
        query, key, value = self._rotated(qkv, angles, plan)
        attended = plan.attend(self._index, query, key, value, self._scale, self._window)
        x = self._o.added_to(x, attended.flatten(1))
        gate, up = self._gate_up(_rms_norm(x, self._mlp_norm)).chunk(2, dim=-1)
        return self._down.added_to(x, self._activation(gate) * up)

    def _kernel_of_all(self) -> LayerKernel | None:
        """All of this in one call, where there is one."""
        linears = self._qkv, self._o, self._gate_up, self._down
        kernels = self._o.kernels
        if kernels is None or not self._is_silu or any(linear.kernels is None for linear in linears):
            return None
        if not kernels.can_attend(self._num_heads, self._num_kv_heads, self._head_size):
            return None
        norms = [(norm.weight.detach(), norm.variance_epsilon) for norm in (self._norm, self._mlp_norm)]
        return LayerKernel(
            *(kernels, self._index, linears, norms, self._qk_norm),
            num_heads=self._num_heads,
            num_kv_heads=self._num_kv_heads,
            head_size=self._head_size,
            scale=self._scale,
            window=self._window,
        )

    def _rotated(
        self, qkv: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], plan: AttentionPlan
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and keys with their rotary embedding, and values; [tokens, heads, head size]."""
        num_rotated = self._num_heads + self._num_kv_heads
        rotated = qkv[:, :num_rotated]
        if self._qk_norm is not None:
            weight, eps = self._qk_norm
            rotated = F.rms_norm(rotated, (self._head_size,), None, eps) * weight
        rotated = _rotate(rotated, angles, plan)
        return rotated[:, : self._num_heads], rotated[:, self._num_heads :], qkv[:, num_rotated:]


def _window_of_all_layers(attention: Any) -> int | None:
    """Mistral's layers read it from the configuration; Llama's have none."""
    return getattr(attention.config, "sliding_window", None) if attention.config.model_type == "mistral" else None


def _qk_norm(attention: Any, num_heads: int, num_kv_heads: int) -> tuple[torch.Tensor, float] | None:
    """Weights [heads of queries and keys, head size] of norms over each head, where a model has them."""
    if not hasattr(attention, "q_norm"):
        return None
    weights = [attention.q_norm.weight.expand(num_heads, -1), attention.k_norm.weight.expand(num_kv_heads, -1)]
    return torch.cat(weights).detach(), attention.q_norm.variance_epsilon


def _rms_norm(x: torch.Tensor, norm: Any) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _rotate(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], plan: AttentionPlan) -> torch.Tensor:
    """Rotary embedding (Su et al. 2021) of [tokens, heads, head size]: x cos + (-x2, x1) sin, x = (x1, x2)."""
    if "rotation" not in plan.shared:
        cos, sin = (part[0, :, None] for part in angles)
        half = sin.shape[-1] // 2
        plan.shared["rotation"] = cos, torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
    cos, signed = plan.shared["rotation"]
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), signed)


def fuse(model: nn.Module, stack: AdapterStack) -> None:
    """Replace the decoder layers that are known."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ in FUSED:
            parent, _, last = name.rpartition(".")
            siblings: Any = model.get_submodule(parent)
            siblings[int(last)] = FusedLayer(module, name, stack)
