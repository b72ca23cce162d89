"""Log-probabilities of given tokens, without a copy of the logits in fp32.

The logits of a micro-batch are its largest tensor: tokens times vocabulary. A log-softmax over it keeps a second one in
fp32 and its backward pass makes two more. Here rows are taken in pieces that fit in the cache, and the probabilities,
which are all that the gradient needs, are written over the logits.
"""

from __future__ import annotations

from typing import Any

import torch

_NUM_AT_A_TIME = {"cpu": 1 << 19}  # logits that are computed with in fp32 at a time: 2 MB, a core's cache
_NUM_ELSEWHERE = 1 << 26  # where starting a kernel costs more than memory


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of logits [rows, vocabulary], log-probabilities fp32 [targets] of the first rows' targets, and whether each is
    the likeliest token. Rows beyond the targets get no gradient. Logits that need one are destroyed, so there can be
    one backward pass only."""
    found: tuple[torch.Tensor, torch.Tensor] = _TokenLogprobs.apply(logits, targets)
    return found


class _TokenLogprobs(torch.autograd.Function):
    """log p[t] = x[t] - logsumexp(x); its gradient is that of x[t] less the probabilities."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size = max(1, _NUM_AT_A_TIME.get(logits.device.type, _NUM_ELSEWHERE) // logits.shape[1])
        scratch = logits.new_empty(2, min(size, len(targets)), logits.shape[1], dtype=torch.float32)
        found, likeliest = [], []
        for rows, tokens in zip(logits[: len(targets)].split(size), targets.split(size), strict=True):
            x, p = scratch[:, : len(rows)]
            x.copy_(rows)
            top = x.amax(dim=1, keepdim=True)
            likeliest.append(_first_of(x, top, out=p) == tokens)
            torch.softmax(x, dim=1, out=p)
            logsumexp = top[:, 0] - p.amax(dim=1).log()  # the likeliest token's p is exp(top - logsumexp)
            found.append(x[torch.arange(len(rows), device=x.device), tokens] - logsumexp)
            if ctx.needs_input_grad[0]:
                rows.copy_(p)
        logprobs, is_right = torch.cat(found), torch.cat(likeliest)
        ctx.save_for_backward(logits, targets, logprobs)
        ctx.mark_non_differentiable(is_right)
        return logprobs, is_right

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        probabilities, targets, logprobs = ctx.saved_tensors
        num, d_logits = len(targets), probabilities
        d_logits[:num].mul_(-grads[0].to(d_logits.dtype)[:, None])
        d_logits[num:].zero_()
        # 1 - p of a target is taken from fp32: near 1, p in bf16 has steps of half a percent.
        d_targets = -grads[0] * torch.expm1(logprobs)
        d_logits[torch.arange(num, device=targets.device), targets] = d_targets.to(d_logits.dtype)
        return d_logits, None


def _first_of(x: torch.Tensor, top: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """argmax of rows whose maxima are known, several times faster on a CPU than torch's. Writes over `out`."""
    size = x.shape[1]
    countdown = torch.arange(size, 0, -1, dtype=torch.float32, device=x.device)  # exact below 2^24
    return size - torch.eq(x, top, out=out).mul_(countdown).amax(dim=1).long()
