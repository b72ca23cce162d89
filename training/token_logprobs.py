"""Log-probabilities of given tokens, without a copy of the logits in fp32.

The logits of a micro-batch are its largest tensor: tokens times vocabulary. A log-softmax over it keeps a second one in
fp32 and its backward pass makes two more. Here rows are taken in pieces that fit in the cache, all that is kept beside
the logits is a number for each row, and the gradient is written over the logits.
"""

from __future__ import annotations

from typing import Any

import torch

_NUM_AT_A_TIME = {"cpu": 1 << 19}  # logits that are computed with in fp32 at a time: 2 MB, a core's cache
_NUM_ELSEWHERE = 1 << 26  # where starting a kernel costs more than memory


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of logits [rows, vocabulary], log-probabilities fp32 [targets] of the first rows' targets, and whether each is
    the likeliest token. Rows beyond the targets get no gradient. The backward pass, of which there can be one only,
    destroys the logits."""
    found: tuple[torch.Tensor, torch.Tensor] = _TokenLogprobs.apply(logits, targets)
    return found


class _TokenLogprobs(torch.autograd.Function):
    """log p[t] = x[t] - logsumexp(x); its gradient is that of x[t] less the probabilities."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        totals, found, likeliest = [], [], []
        for rows, tokens in _pieces(logits, targets):
            x = rows.float()
            totals.append(torch.logsumexp(x, dim=1))
            found.append(x.gather(1, tokens[:, None])[:, 0] - totals[-1])
            likeliest.append(x.argmax(dim=1) == tokens)  # several times faster in fp32
        ctx.save_for_backward(logits, targets, torch.cat(totals))
        is_right = torch.cat(likeliest)
        ctx.mark_non_differentiable(is_right)
        return torch.cat(found), is_right

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, totals = ctx.saved_tensors
        start = 0
        for rows, tokens in _pieces(logits, targets):
            end = start + len(rows)
            factor, x = grads[0][start:end, None], rows.float()
            x.sub_(totals[start:end, None]).exp_().mul_(-factor).scatter_add_(1, tokens[:, None], factor)
            rows.copy_(x)
            start = end
        logits[start:].zero_()
        return logits, None


def _pieces(logits: torch.Tensor, targets: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    size = max(1, _NUM_AT_A_TIME.get(logits.device.type, _NUM_ELSEWHERE) // logits.shape[1])
    return list(zip(logits[: len(targets)].split(size), targets.split(size), strict=True))
