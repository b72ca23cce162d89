"""RMSNorm and rotary embedding of our own are transformers', forwards and backwards, and stand in for no other code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import modeling_llama

from training.norm_and_rotary import rms_norm, rotate, use_few_kernels

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
IDS = torch.arange(40).view(2, 20) + 7
Function = Callable[..., torch.Tensor]


def assert_same(ours: Function, theirs: Function, *inputs: torch.Tensor) -> None:
    """Values, and gradients for all inputs that take one."""
    found, expected = ours(*inputs), theirs(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    upstream, trained = torch.randn_like(expected), [x for x in inputs if x.requires_grad]
    both = (torch.autograd.grad(out, trained, upstream) for out in (found, expected))
    for mine, other in zip(*both, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_rms_norm() -> None:
    torch.manual_seed(0)
    norm = modeling_llama.LlamaRMSNorm(24, eps=1e-3)
    x, weight = torch.randn(2, 5, 3, 24, requires_grad=True), torch.randn(24, requires_grad=True)

    def theirs(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, x)

    assert_same(lambda x, weight: rms_norm(x, weight, 1e-3), theirs, x, weight)


def test_rms_norm_in_bf16_is_as_near_to_the_exact_one_as_transformers_is() -> None:
    torch.manual_seed(0)
    norm = modeling_llama.LlamaRMSNorm(64, eps=1e-6).bfloat16()
    norm.weight.data.normal_()
    x = torch.randn(200, 64).bfloat16()
    exact = x.double() * x.double().square().mean(-1, keepdim=True).add(1e-6).rsqrt() * norm.weight.double()
    ours, theirs = rms_norm(x, norm.weight, 1e-6), norm(x)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().mean() <= (theirs - exact).abs().mean()


@pytest.mark.parametrize("which", [0, 1], ids=["queries", "keys"])
def test_rotation(which: int) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(2, 7, heads, 8).transpose(1, 2).requires_grad_() for heads in (6, 3))
    angles = torch.randn(1, 7, 4).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()

    def turned(by: Callable[..., tuple[torch.Tensor, torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
        return by(*((x, k) if which == 0 else (q, x)), cos, sin)[which]

    x = (q, k)[which]
    assert_same(lambda x: turned(rotate, x), lambda x: turned(modeling_llama.apply_rotary_pos_emb, x), x)


def model_of(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES)).eval()


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "smollm3", "granite", "gemma", "phi3", "olmo2"])
def test_models_compute_what_they_did(model_type: str) -> None:
    plain, ours = model_of(model_type), model_of(model_type)
    use_few_kernels(ours)
    losses = [model(IDS, labels=IDS).loss for model in (plain, ours)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    for loss in losses:
        loss.backward()
    for mine, other in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_only_known_code_is_replaced_and_only_in_the_given_model() -> None:
    def replaced(model: nn.Module) -> set[str]:
        return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}

    models = {name: model_of(name) for name in ("llama", "gemma", "phi3", "olmo2")}
    for model in models.values():
        use_few_kernels(model)
    assert {name: replaced(model) for name, model in models.items()} == {
        "llama": {"LlamaRMSNorm", "LlamaAttention"},
        "gemma": {"GemmaAttention"},  # its norm multiplies by 1 + weight
        "phi3": {"Phi3RMSNorm"},  # it turns a part of each head
        "olmo2": set(),
    }
    assert not replaced(model_of("llama"))
