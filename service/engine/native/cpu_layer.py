"""A decoder layer of the Llama family by one call of `cpu_layer.c`, and what such calls are told."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from typing import TYPE_CHECKING

import torch

from service.engine.native.cpu_kernels import Adapted, CpuKernels
from service.engine.native.flat_attention import Part, Scattered, Whole
from service.engine.native.lora import LoraPlan

if TYPE_CHECKING:
    from service.engine.native.linear import FusedLinear


class _Group(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("panels", "bias")),
        *((name, c_int64) for name in ("in_features", "out_features", "first", "num_layers")),
        ("columns", c_void_p),
    ]


class _Layer(Structure):
    _fields_ = [
        *((name, _Group) for name in ("qkv", "o", "gate_up", "down")),
        *((name, c_void_p) for name in ("norm", "mlp_norm", "head_norms")),
        *((name, c_double) for name in ("norm_eps", "mlp_norm_eps", "head_norm_eps", "scale")),
        *((name, c_int64) for name in ("num_heads", "num_kv", "size", "window", "number")),
    ]


class _Part(Structure):
    _fields_ = [
        ("states", c_void_p),
        *((name, c_int64) for name in ("num_rows", "capacity")),
        *((name, c_void_p) for name in ("tokens", "rows", "positions")),
        *((name, c_int64) for name in ("row", "first", "start", "num")),
    ]


class _Step(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("x", "normed", "qkv", "attended", "gate_up", "gated", "cosine", "sine")),
        ("num_tokens", c_int64),
        ("parts", POINTER(_Part)),
        ("num_parts", c_int64),
        ("adapted", POINTER(Adapted)),
    ]


class LayerStep:
    """One step's tokens, for all layers."""

    def __init__(
        self,
        x: torch.Tensor,
        widths: Sequence[int],
        angles: tuple[torch.Tensor, torch.Tensor],
        parts: Sequence[_Part],
        lora: LoraPlan,
    ) -> None:
        """x [tokens, width] is changed in place; widths of what a layer makes of a token, one thing after another;
        angles are cosine and sine [tokens, head size]."""
        cosine, sine = (part.contiguous() for part in angles)
        assert x.is_contiguous()
        room = x.new_empty(len(x) * sum(widths))
        at, addresses = room.data_ptr(), []
        for width in widths:
            addresses.append(at)
            at += len(x) * width * x.itemsize
        self._tensors = x, room, cosine, sine  # as long as their addresses are in use
        if lora.listed is not None:
            lora.listed.check(x)
        self.struct = _Step(
            *(x.data_ptr(), *addresses, cosine.data_ptr(), sine.data_ptr(), len(x)),
            *((_Part * len(parts))(*parts), len(parts)),
            ctypes.pointer(lora.listed.struct) if lora.listed is not None else None,
        )


class LayerKernel:
    """One layer's weights, and the call."""

    def __init__(
        self,
        kernels: CpuKernels,
        number: int,
        linears: Sequence[FusedLinear],
        norms: Sequence[tuple[torch.Tensor, float]],
        head_norms: tuple[torch.Tensor, float] | None,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        scale: float,
        window: int | None,
    ) -> None:
        """Linear layers: q, k and v; o; gate and up; down. Norms before the first and the third, each with its
        epsilon; `head_norms` [heads of queries and keys, size] those of each head."""
        self._function = kernels.long.decoder_layer
        self._tensors = norms, head_norms
        qkv, o, gate_up, down = groups = [_group(linear) for linear in linears]
        head_weights, head_eps = head_norms or (None, 0.0)
        self._widths = qkv.in_features, qkv.out_features, o.in_features, gate_up.out_features, down.in_features
        self._struct = _Layer(
            *groups,
            *(weight.data_ptr() for weight, _ in norms),
            None if head_weights is None else head_weights.data_ptr(),
            *(*(eps for _, eps in norms), head_eps, scale),
            *(num_heads, num_kv_heads, head_size, window or 0, number),
        )

    def prepare(
        self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], parts: Sequence[Part], lora: LoraPlan
    ) -> LayerStep | None:
        """A step for this and all other layers; None if it holds what only torch computes."""
        if lora.pieces:
            return None
        described = []
        for part in parts:
            if (one := _described(part)) is None:
                return None
            described.append(one)
        return LayerStep(x, self._widths, angles, described, lora)

    def __call__(self, step: LayerStep) -> None:
        """Let the step's tokens pass through the layer."""
        self._function(ctypes.byref(self._struct), ctypes.byref(step.struct))


def _group(linear: FusedLinear) -> _Group:
    factors = linear.factors
    return _Group(
        *(linear.laid_out.data_ptr(), None if linear.bias is None else linear.bias.data_ptr()),
        *(factors.in_features, sum(factors.out_features), factors.first, len(factors.names)),
        factors.columns_at.data_ptr(),
    )


def _described(part: Part) -> _Part | None:
    match part:
        case Scattered(pool=pool, which=which):
            cache = pool.states.data_ptr(), pool.num_rows, pool.capacity
            lists = (each.data_ptr() for each in which)
            return _Part(*cache, *lists, 0, 0, 0, which.shape[1])
        case Whole(row=row, tokens=tokens, start=start):
            pool, num = row.pool, tokens.stop - tokens.start
            assert start + num <= pool.capacity
            cache = pool.states.data_ptr(), pool.num_rows, pool.capacity
            return _Part(*cache, None, None, None, row.number, tokens.start, start, num)
    return None
