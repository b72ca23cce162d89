"""Fused linear layers compute what the layers that they stand in for do, in whatever layout their weights lie."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from service.engine.native.linear import FusedLinear, fuse_single, linear_layers
from service.engine.native.lora import AdapterStack


def layers(dtype: torch.dtype, num_inputs: int, *, bias: bool) -> list[nn.Linear]:
    torch.manual_seed(3)
    return [nn.Linear(num_inputs, out, bias=bias).to(dtype) for out in (48, 16, 32)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_inputs", [64, 50])  # the kernel takes multiples of 32
@torch.inference_mode()
def test_layers_with_one_input_are_one_product(num_inputs: int, dtype: torch.dtype, bias: bool) -> None:
    single = layers(dtype, num_inputs, bias=bias)
    fused = FusedLinear(single, ["q", "k", "v"], AdapterStack(single[0]))
    x = torch.randn(2, 5, num_inputs).to(dtype)
    torch.testing.assert_close(fused(x), torch.cat([layer(x) for layer in single], dim=-1))
    flat, residual = x.flatten(0, 1), torch.randn(10, 96).to(dtype)
    torch.testing.assert_close(fused.added_to(residual, flat), residual + fused(flat), rtol=2e-2, atol=2e-2)
    assert torch.equal(fused.rows(1), single[1].weight), "adapters with DoRA need the weights themselves"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_every_linear_layer_of_a_model_is_replaced_under_its_name(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.ModuleDict({"out": Conv1D(48, 32)})["out"]).to(dtype)
    x = torch.randn(7, 64).to(dtype)
    expected = model(x)
    fuse_single(model, AdapterStack(model))
    torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
    assert {name: layer.shape for name, layer in linear_layers(model).items()} == {"0": (32, 64), "2": (48, 32)}
