"""Log-probabilities of tokens are those of a plain log-softmax, and so are their gradients."""

from __future__ import annotations

import pytest
import torch

from training import token_logprobs as module
from training.token_logprobs import token_logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_values_and_gradients_are_those_of_a_log_softmax(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setitem(module._NUM_AT_A_TIME, "cpu", 300)  # three rows at a time, and one left
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(12, 100, generator=generator)).to(dtype)
    targets = torch.randint(100, (10,), generator=generator)
    weights = torch.randn(10, generator=generator)
    plain = logits.clone().requires_grad_(True)
    expected = plain[:10].float().log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
    (expected * weights).sum().backward()
    ours = logits.clone().requires_grad_(True)
    found, is_right = token_logprobs(ours * 1, targets)
    (found * weights).sum().backward()
    torch.testing.assert_close(found, expected)
    assert is_right.tolist() == (logits[:10].argmax(dim=1) == targets).tolist()
    assert ours.grad is not None and plain.grad is not None
    torch.testing.assert_close(ours.grad, plain.grad)
    assert not ours.grad[10:].any()


def test_of_equally_likely_tokens_the_first_counts_as_the_likeliest() -> None:
    logits = torch.zeros(3, 6)
    logits[1, 2:4] = 5.0
    _, is_right = token_logprobs(logits, torch.tensor([0, 2, 1]))
    assert is_right.tolist() == [True, True, False]


def test_the_gradient_of_a_near_certain_token_keeps_its_size_in_bf16() -> None:
    logits = torch.tensor([[0.0, 8.0]], dtype=torch.bfloat16, requires_grad=True)
    logprobs, _ = token_logprobs(logits * 1, torch.tensor([1]))
    logprobs.sum().backward()
    rest = torch.tensor(8.0).exp().add(1).reciprocal()  # 1 - p, of which p in bf16 knows nothing
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0, 1].float(), rest, rtol=0.01, atol=0)


def test_looking_without_a_gradient_leaves_the_logits() -> None:
    logits = torch.randn(3, 6)
    before = logits.clone()
    token_logprobs(logits, torch.tensor([0, 2, 1]))
    assert logits.equal(before)
