"""Kernels of our own for bf16 on a CPU: torch spends half of a decoding step on starting small operations, and its
products of few tokens read weights at half the speed of the memory. Compiled from `cpu_*.c` for the processor at hand
when an engine starts, in a second; without gcc, or in another dtype or on a GPU, torch's operations compute the same.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
import shutil
import subprocess
import tempfile
from ctypes import c_double, c_int64, c_void_p
from pathlib import Path

import torch
from torch.nn import functional as F

log = logging.getLogger(__name__)

_SOURCES = [Path(__file__).with_name(name) for name in ("cpu_kernels.c", "cpu_attention.c", "cpu_linear.c")]
# Sums may be reordered, which is what vectors of them need; infinities and NaN keep their meaning.
_FLAGS = (
    "-O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -fassociative-math -fno-signed-zeros -fPIC -shared"
)
_X86_FLAGS = ["-mprefer-vector-width=512"]
_MAX_GROUP, _MAX_HEAD_SIZE = 32, 256  # as in the source
_PANEL, _STEP = 32, 32  # as in cpu_linear.c: outputs, and inputs, that are multiplied at a time
_SIGNATURES = {
    "linear": [c_void_p] * 5 + [c_int64] * 3,
    "rms_norm": [c_void_p] * 3 + [c_double] + [c_int64] * 2,
    "silu_mul": [c_void_p] * 2 + [c_int64] * 2,
    "rotate": [c_void_p] * 4 + [c_double] + [c_int64] * 4,
    "attend": [
        *(c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_int64),
        *(c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64, c_double, c_int64),
    ],
    "attend_piece": [
        *(c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_void_p),
        *(c_int64, c_int64, c_int64, c_int64, c_int64, c_int64, c_double, c_int64),
    ],
    "adapt": [c_void_p] * 5 + [c_int64, c_void_p, c_int64, c_void_p] + [c_int64] * 3 + [c_void_p],
}


def kernels_for(x: torch.Tensor) -> CpuKernels | None:
    """The kernels, where they are for tensors like this one."""
    return _load() if x.dtype is torch.bfloat16 and x.is_cpu else None


@functools.cache
def _load() -> CpuKernels | None:
    """Compile and load, once in a process."""
    compiler = shutil.which("gcc")  # whose OpenMP is torch's, so that both use the same threads
    if compiler is None:
        log.warning("gcc is not installed: bf16 models run without kernels of our own, at about half the speed")
        return None
    more = _X86_FLAGS if platform.machine() == "x86_64" else []
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernels.so"
        done = subprocess.run(
            [compiler, *_FLAGS.split(), *more, "-o", str(library), *map(str, _SOURCES)], capture_output=True, text=True
        )
        if done.returncode:
            log.warning("gcc failed, bf16 models run without kernels of our own: %s", done.stderr)
            return None
        try:
            return CpuKernels(ctypes.PyDLL(str(library)))  # PyDLL: a kernel is too short to hand the interpreter over
        except OSError as error:  # a temporary folder from which nothing may be run
            log.warning("bf16 models run without kernels of our own: %s", error)
            return None


class CpuKernels:
    """The functions of the source, on tensors."""

    def __init__(self, library: ctypes.PyDLL) -> None:
        for name, types in _SIGNATURES.items():
            if (function := getattr(library, name, None)) is not None:
                function.argtypes, function.restype = types, None
        self.library = library

    def can_multiply(self, num_inputs: int) -> bool:
        """Whether there is a `linear` for so many: it needs a processor with products of bf16."""
        return hasattr(self.library, "linear") and num_inputs % _STEP == 0

    def linear(
        self,
        x: torch.Tensor,
        panels: torch.Tensor,
        num_outputs: int,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x W^T + bias + residual [tokens, out] of x [tokens, in] and W as panels."""
        assert x.is_contiguous()
        assert residual is None or residual.is_contiguous()
        num_tokens, num_inputs = x.shape
        y = x.new_empty(num_tokens, num_outputs)
        addresses = [0 if part is None else part.data_ptr() for part in (bias, residual)]
        self.library.linear(
            *(y.data_ptr(), x.data_ptr(), panels.data_ptr(), *addresses, num_tokens, num_inputs, num_outputs)
        )
        return y

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Of x [tokens, width]."""
        assert x.is_contiguous()
        out = torch.empty_like(x)
        self.library.rms_norm(out.data_ptr(), x.data_ptr(), weight.data_ptr(), eps, *x.shape)
        return out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) up [tokens, width] of [tokens, 2 * width]."""
        assert gate_up.is_contiguous()
        num_tokens, width = len(gate_up), gate_up.shape[1] // 2
        out = gate_up.new_empty(num_tokens, width)
        self.library.silu_mul(out.data_ptr(), gate_up.data_ptr(), num_tokens, width)
        return out

    def rotate(
        self,
        x: torch.Tensor,
        num_heads: int,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        norms: torch.Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        """Rotary embedding by cosine and sine [tokens, size] of the first heads of x [tokens, all heads, size], in
        place, after a norm with weights [heads, size]."""
        assert x.is_contiguous()
        assert cosine.is_contiguous()
        assert sine.is_contiguous()
        num_tokens, num_all, size = x.shape
        weights = 0 if norms is None else norms.data_ptr()
        self.library.rotate(
            *(x.data_ptr(), cosine.data_ptr(), sine.data_ptr(), weights, eps),
            *(num_tokens, num_all * size, num_heads, size),
        )

    @staticmethod
    def can_attend(num_heads: int, num_kv_heads: int, size: int) -> bool:
        """Whether `attend` has room for heads like these."""
        return num_heads // num_kv_heads <= _MAX_GROUP and size <= _MAX_HEAD_SIZE

    def attend(
        self,
        out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        which: torch.Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> None:
        """Write keys and values of some tokens into the cache [2, rows, KV heads, capacity, size] and into `out`
        [tokens, heads, size] what they attend to. `which` int64 [3, some]: their numbers, rows and positions."""
        num_heads, num_kv_heads, size = query.shape[1], *key.shape[1:]
        q, q_stride, k, v, k_stride = _heads_of_all(query, key, value)
        _, num_rows, _, capacity, _ = cache.shape
        tokens, step = which.data_ptr(), which.stride(0) * which.itemsize
        self.library.attend(
            *(out.data_ptr(), q.data_ptr(), q_stride, k.data_ptr(), v.data_ptr(), k_stride),
            *(cache.data_ptr(), num_rows, capacity, tokens, tokens + step, tokens + 2 * step, which.shape[1]),
            *(num_heads, num_kv_heads, size, scale, window or 0),
        )

    def can_attend_piece(self, size: int) -> bool:
        """Whether there is an `attend_piece` for heads of this size: it needs a processor with products of bf16."""
        return hasattr(self.library, "attend_piece") and size % 2 == 0

    def attend_piece(
        self,
        out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        start: int,
        *,
        scale: float,
        window: int | None,
    ) -> None:
        """The same for all tokens of a piece of one prompt, with `start` tokens before it.

        out and query [tokens, heads, size], cache [2, KV heads, capacity, size].
        """
        num, num_heads, size = query.shape
        num_kv_heads = key.shape[1]
        q, q_stride, k, v, k_stride = _heads_of_all(query, key, value)
        keys, values = cache
        assert out.is_contiguous()
        assert keys.is_contiguous()
        assert start + num <= keys.shape[1]
        self.library.attend_piece(
            *(out.data_ptr(), q.data_ptr(), q_stride, k.data_ptr(), v.data_ptr(), k_stride),
            *(keys.data_ptr(), values.data_ptr(), keys.shape[1], start, num),
            *(num_heads, num_kv_heads, size, scale, window or 0),
        )


def panels_of(weight: torch.Tensor) -> torch.Tensor:
    """A weight [out, in] as `linear` wants it: [panels, steps, 2, pairs of inputs, 16 outputs, 2], zeros at the end."""
    num_outputs, num_inputs = weight.shape
    padded = F.pad(weight, (0, 0, 0, -num_outputs % _PANEL))
    parts = padded.view(-1, 2, _PANEL // 2, num_inputs // _STEP, _STEP // 2, 2)
    return parts.permute(0, 3, 1, 4, 2, 5).contiguous()


def weight_of(panels: torch.Tensor, num_outputs: int) -> torch.Tensor:
    """The weight [out, in] again."""
    rows = panels.permute(0, 2, 4, 1, 3, 5).reshape(len(panels) * _PANEL, -1)
    return rows[:num_outputs]


class AdaptedTokens:
    """Tokens by their adapters, for all layers of a step: what a call passes on is looked up once."""

    def __init__(
        self,
        kernels: CpuKernels,
        tokens: torch.Tensor,
        starts: torch.Tensor,
        factors: torch.Tensor,
        *,
        max_rank: int,
        max_width: int,
    ) -> None:
        """`tokens` int64 lists those of each adapter, from starts[i] to starts[i + 1]. `factors` int64 [adapters,
        layers, 4] holds addresses of A [rank, in], B^T [rank, out] and of DoRA's fp32 gains [out] (0: none), and the
        rank (0: an adapter leaves a layer alone). `max_width`: of the inputs and ranks of layers that are adapted
        together."""
        self._function = kernels.library.adapt
        scratch = torch.empty(len(tokens) * max_width)
        self._tensors = tokens, starts, factors, scratch  # as long as their addresses are in use
        self._num_tokens = int(tokens.max()) + 1  # at least, of any input
        self._which = tokens.data_ptr(), starts.data_ptr(), len(factors)
        self._factors, self._row_bytes = factors.data_ptr(), factors.shape[2] * factors.itemsize
        self._stride, self._max_rank, self._scratch = factors.shape[1], max_rank, scratch.data_ptr()

    def adapt(
        self, y: torch.Tensor, x: torch.Tensor, bias: int, first_layer: int, columns: int, num_layers: int
    ) -> None:
        """Add to y [tokens, out of some layers, side by side] what adapters make of x [tokens, in]. `columns` is the
        address of int64 [layers + 1], where each layer's outputs begin; `bias` of the layers' own [out], or 0."""
        assert x.is_contiguous()
        assert y.is_contiguous()
        assert len(x) >= self._num_tokens
        self._function(
            *(y.data_ptr(), x.data_ptr(), bias, *self._which, self._factors + first_layer * self._row_bytes),
            *(self._stride, columns, num_layers, x.shape[1], self._max_rank, self._scratch),
        )


def _heads_of_all(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, int, torch.Tensor, torch.Tensor, int]:
    """Query and its numbers from token to token, key, value and theirs, which are the same for both."""
    (q, q_stride), (k, k_stride), (v, v_stride) = map(_heads, (query, key, value))
    if k_stride != v_stride:
        k, v = k.contiguous(), v.contiguous()
        k_stride = k.shape[1] * k.shape[2]
    return q, q_stride, k, v, k_stride


def _heads(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x [tokens, heads, size] with the heads of a token side by side, and numbers from token to token."""
    if x.stride(2) != 1 or x.stride(1) != x.shape[2]:
        x = x.contiguous()
    return x, x.stride(0)
