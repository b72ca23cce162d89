"""Kernels of our own for bf16 on a CPU: torch spends half of a decoding step on starting small operations, and its
products of few tokens read weights at half the speed of the memory. Compiled from `cpu_*.c` for the processor at hand
when an engine starts, in two seconds; without gcc, in another dtype or on a GPU, torch's operations compute the same.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from ctypes import Structure, c_double, c_int64, c_void_p
from pathlib import Path

import torch
from torch.nn import functional as F

log = logging.getLogger(__name__)

_SOURCES = [
    Path(__file__).with_name(f"cpu_{part}.c") for part in ("adapters", "attention", "layer", "linear", "prompts")
]
# Sums may be reordered, which is what vectors of them need; infinities and NaN keep their meaning.
_FLAGS = "-O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math -fassociative-math -fno-signed-zeros -fPIC"
_X86_FLAGS = ["-mprefer-vector-width=512"]
_MAX_GROUP, _MAX_HEAD_SIZE = 32, 256  # as in cpu_kernels.h
_NUM_SHORT = 64  # tokens, up to which a product is short
_PANEL, _STEP = 32, 32  # as in cpu_linear.c: outputs, and inputs, that are multiplied at a time
_SIGNATURES = {
    "linear": [c_void_p] * 5 + [c_int64] * 3,
    "attend": [c_void_p] * 2 + [c_int64] * 2 + [c_void_p] * 3 + [c_int64],
    "attend_piece": [c_void_p] * 3 + [c_int64] * 4,
    "adapt": [c_void_p] * 4 + [c_int64, c_void_p] + [c_int64] * 2,
    "decoder_layer": [c_void_p] * 2,
}


def kernels_for(x: torch.Tensor) -> CpuKernels | None:
    """The kernels, where they are for tensors like this one."""
    return _load() if x.dtype is torch.bfloat16 and x.is_cpu else None


@functools.cache
def _load(*flags: str) -> CpuKernels | None:
    """Compile, with more flags if there are any, and load, once in a process."""
    compiler = shutil.which("gcc")  # whose OpenMP is torch's, so that both use the same threads
    if compiler is None:
        log.warning("gcc is not installed: bf16 models run without kernels of our own, at a third of the speed")
        return None
    more = _X86_FLAGS if platform.machine() == "x86_64" else []
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "kernels.so"
        if errors := _compile([compiler, *_FLAGS.split(), *more, *flags], library):
            log.warning("gcc failed, bf16 models run without kernels of our own: %s", errors)
            return None
        try:
            return CpuKernels(str(library))
        except OSError as error:  # a temporary folder from which nothing may be run
            log.warning("bf16 models run without kernels of our own: %s", error)
            return None


def _compile(command: list[str], library: Path) -> str:
    """All sources at the same time; returns what went wrong."""

    def run(*arguments: str) -> str:
        done = subprocess.run([*command, *arguments], capture_output=True, text=True)
        return done.stderr or f"exit code {done.returncode}" if done.returncode else ""

    objects = [library.with_name(f"{source.stem}.o") for source in _SOURCES]
    with ThreadPoolExecutor() as pool:
        errors = pool.map(lambda each: run("-c", str(each[0]), "-o", str(each[1])), zip(_SOURCES, objects, strict=True))
    return "".join(errors) or run("-shared", "-Wl,-Bsymbolic", *map(str, objects), "-o", str(library))


class _Heads(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("out", "query", "key", "value")),
        *((name, c_int64) for name in ("q_stride", "kv_stride", "num_heads", "num_kv", "size")),
        ("scale", c_double),
        ("window", c_int64),
    ]


class Adapted(Structure):
    """Tokens by their adapters; see `cpu_kernels.h`."""

    _fields_ = [
        *((name, c_void_p) for name in ("tokens", "starts")),
        ("num_adapters", c_int64),
        ("factors", c_void_p),
        *((name, c_int64) for name in ("stride", "max_rank")),
        ("scratch", c_void_p),
        ("is_scaled", c_int64),
    ]


class CpuKernels:
    """The functions of the sources, on tensors."""

    def __init__(self, library: str) -> None:
        # With few tokens, all but a whole layer are too short to hand the interpreter over, which PyDLL does not.
        self.library, self.long = ctypes.PyDLL(library), ctypes.CDLL(library)
        for name, types in _SIGNATURES.items():
            for loaded in (self.library, self.long):
                if (function := getattr(loaded, name, None)) is not None:
                    function.argtypes, function.restype = types, None

    @staticmethod
    def can_multiply(num_inputs: int) -> bool:
        """Whether `linear` takes so many."""
        return num_inputs % _STEP == 0

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
        (self.long if num_tokens > _NUM_SHORT else self.library).linear(
            *(y.data_ptr(), x.data_ptr(), panels.data_ptr(), *addresses, num_tokens, num_inputs, num_outputs)
        )
        return y

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
        _, num_rows, _, capacity, _ = cache.shape
        tokens, step = which.data_ptr(), which.stride(0) * which.itemsize
        heads, _tensors = _heads_of_all(out, query, key, value, scale, window)
        lists = tokens, tokens + step, tokens + 2 * step
        self.library.attend(ctypes.byref(heads), cache.data_ptr(), num_rows, capacity, *lists, which.shape[1])

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
        keys, values = cache
        assert keys.is_contiguous()
        assert start + len(query) <= keys.shape[1]
        heads, _tensors = _heads_of_all(out, query, key, value, scale, window)
        self.long.attend_piece(
            ctypes.byref(heads), keys.data_ptr(), values.data_ptr(), keys.shape[1], 0, start, len(query)
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
        max_members: int,
        is_scaled: bool,
    ) -> None:
        """`tokens` int64 lists those of each adapter, from starts[i] to starts[i + 1]. `factors` int64 [adapters,
        layers, 4] holds addresses of A [rank, in], B^T [rank, out] and of DoRA's fp32 gains [out] (0: none), and the
        rank (0: an adapter leaves a layer alone). `max_members`: of layers that are adapted together."""
        self._function = kernels.library.adapt
        scratch = torch.empty(len(tokens) * max_members * max_rank)
        self._tensors = tokens, starts, factors, scratch  # as long as their addresses are in use
        self._num_tokens = int(tokens.max()) + 1  # at least, of any input
        self.struct = Adapted(
            *(tokens.data_ptr(), starts.data_ptr(), *factors.shape[:1], factors.data_ptr(), factors.shape[1]),
            *(max_rank, scratch.data_ptr(), is_scaled),
        )

    def check(self, x: torch.Tensor) -> None:
        """That these tokens are among those of x [tokens, in]."""
        assert x.is_contiguous()
        assert len(x) >= self._num_tokens

    def adapt(
        self, y: torch.Tensor, x: torch.Tensor, bias: int, first_layer: int, columns: int, num_layers: int
    ) -> None:
        """Add to y [tokens, out of some layers, side by side] what adapters make of x [tokens, in]. `columns` is the
        address of int64 [layers + 1], where each layer's outputs begin; `bias` of the layers' own [out], or 0."""
        self.check(x)
        assert y.is_contiguous()
        assert y.dtype is torch.bfloat16
        self._function(
            *(y.data_ptr(), x.data_ptr(), bias, ctypes.byref(self.struct), first_layer, columns),
            *(num_layers, x.shape[1]),
        )


def _heads_of_all(
    out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int | None
) -> tuple[_Heads, tuple[torch.Tensor, ...]]:
    """What the kernels are told of them, and tensors to keep meanwhile."""
    assert out.is_contiguous()
    num_heads, num_kv_heads, size = query.shape[1], *key.shape[1:]
    (q, q_stride), (k, k_stride), (v, v_stride) = map(_heads, (query, key, value))
    if k_stride != v_stride:
        k, v = k.contiguous(), v.contiguous()
        k_stride = num_kv_heads * size
    addresses = [x.data_ptr() for x in (out, q, k, v)]
    return _Heads(*addresses, q_stride, k_stride, num_heads, num_kv_heads, size, scale, window or 0), (q, k, v)


def _heads(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x [tokens, heads, size] with the heads of a token side by side, and numbers from token to token."""
    if x.stride(2) != 1 or x.stride(1) != x.shape[2]:
        x = x.contiguous()
    return x, x.stride(0)
