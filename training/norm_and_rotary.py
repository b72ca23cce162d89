"""RMSNorm and rotary embedding of few kernels, in place of those of a transformers model.

transformers writes both as chains of small operations, each of which reads and writes all activations, forwards and
backwards; on a CPU they cost as much as a sixth of the matrix products of a small model. Only code that is known, word
for word, is replaced, and only in the given model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.models.llama import modeling_llama

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROTARY = "apply_rotary_pos_emb"  # what every model's code calls it


def use_few_kernels(model: PreTrainedModel) -> None:
    """Replace what is written as it is in transformers' Llama, which it copies into the code of most models."""
    for module in model.modules():
        forward = type(module).forward
        if _is_copy(forward, modeling_llama.LlamaRMSNorm.forward):
            module.forward = MethodType(_norm, module)
        elif _is_copy(_global(forward, _ROTARY), modeling_llama.apply_rotary_pos_emb):
            module.forward = MethodType(_with_global(cast(FunctionType, forward), _ROTARY, rotate), module)


def _is_copy(function: Any, known: Callable[..., Any]) -> bool:
    parts = [(f.__code__.co_code, f.__code__.co_names) for f in (function, known) if isinstance(f, FunctionType)]
    return len(parts) == 2 and parts[0] == parts[1]


def _global(function: Any, name: str) -> Any:
    """What a function calls by a name of its file; None if it does not."""
    if not isinstance(function, FunctionType) or name not in function.__code__.co_names:
        return None
    return function.__globals__.get(name)


def _with_global(function: FunctionType, name: str, value: Any) -> FunctionType:
    """The same function where a name of its file means something else."""
    names = function.__globals__ | {name: value}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


# -- RMSNorm -----------------------------------------------------------------------------------------------------------


def _norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """weight * x / sqrt(mean(x^2) + epsilon) over the last dimension, computed in fp32 (Zhang and Sennrich 2019)."""
    y: torch.Tensor = _RMSNorm.apply(x, weight, epsilon)
    return y


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and a number r a row: y = w x r. With u the gradient of y, that of x is
    r (w u - x r^2 mean(w u x)), and that of w is the sum of u x r over the rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        r = lengths.square_().div_(rows.shape[1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (rows * r).mul_(weight).to(torch.promote_types(x.dtype, weight.dtype)).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, r = ctx.saved_tensors
        rows, upstream = (t.reshape(-1, x.shape[-1]).float() for t in (x, grads[0]))
        products = upstream * rows
        means = (products @ weight.float())[:, None] / rows.shape[1]
        d_x = (upstream * weight).mul_(r).addcmul_(rows, means.mul_(r**3), value=-1)
        d_weight = (r[:, 0] @ products).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return d_x.to(x.dtype).view(x.shape), d_weight, None


# -- rotary embedding --------------------------------------------------------------------------------------------------


def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [batch, heads, tokens, head_dim] turned by the angles of their positions; `cos` and `sin` are
    [batch, tokens, head_dim], with equal halves (Su et al. 2021)."""
    turned = (_Rotation.apply(x.transpose(1, 2), *_wide(cos, sin, x.shape[1])) for x in (q, k))
    q, k = (x.transpose(1, 2) for x in turned)
    return q, k


class _Rotation(torch.autograd.Function):
    """x cos + swap(x) sin, where swap exchanges the halves of a head and sin has the signs: the transpose of this map
    is the rotation back, which has the other signs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, sin, -1), None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, dims=-1), sin, value=sign)


@lru_cache(maxsize=2)  # queries and keys, and the same in all layers of a pass
def _wide(cos: torch.Tensor, sin: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[batch, tokens, heads, head_dim] each, so that kernels run along whole tokens; the sine of the first half is
    negated."""
    first, second = sin.chunk(2, dim=-1)
    parts = (cos, torch.cat((-first, second), dim=-1))
    cos, sin = (x.unsqueeze(2).expand(-1, -1, num_heads, -1).contiguous() for x in parts)
    return cos, sin
