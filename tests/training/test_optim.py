"""What an optimizer step works on: gradients of bf16 weights, summed in fp32."""

from __future__ import annotations

import torch
from torch import nn

from training.optim import _PIECE, Trainer
from training.spec import Hyperparameters


def test_bf16_gradients_of_all_passes_are_summed_in_fp32_to_the_last_number() -> None:
    """A matrix of more numbers than are added at once, and one whose gradient is laid out column by column."""
    torch.manual_seed(0)
    large, small = nn.Parameter(torch.randn(_PIECE // 64 + 3, 64)), nn.Parameter(torch.randn(6, 5).T)
    model = nn.ParameterDict({"large": large, "small": small})
    trainer = Trainer(model, Hyperparameters(learning_rate=0.1), 1, torch.bfloat16)
    passes = [[torch.randn_like(param).bfloat16() for param in (large, small)] for _ in range(3)]
    for grads in passes:
        sum((param * grad).sum() for param, grad in zip((large, small), grads, strict=True)).backward()
    for name, *grads in zip(("large", "small"), *passes, strict=True):
        assert torch.equal(trainer.masters[name].grad, grads[0].float() + grads[1].float() + grads[2].float())
        assert trainer.params[name].grad is None, "freed at once"
