"""Every token gets what its own adapter does to it, whatever the others in the batch use."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from service.engine.native.linear import FusedLinear
from service.engine.native.lora import AdapterStack, Factors, LoadedAdapter, Piece

IN, OUT = 24, {"q": 16, "k": 8}


def adapter(number: int, dtype: torch.dtype = torch.float32) -> LoadedAdapter:
    """Ranks, targets and DoRA mixed."""
    generator = torch.Generator().manual_seed(number)
    rank = (2, 4, 9, 16)[number % 4]
    names = (("q", "k"), ("q",), ("k",))[number % 3]
    factors = {}
    for name in names:
        down, up = torch.randn(rank, IN, generator=generator), torch.randn(rank, OUT[name], generator=generator)
        gain = 1 + torch.rand(OUT[name], generator=generator) if number % 5 == 0 else None
        factors[name] = Factors(down.to(dtype), up.to(dtype), gain)
    return LoadedAdapter(f"adapter-{number}", factors)


class Group:
    """Two fused layers with an adapter stack, beside the same computed token by token."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.dtype = dtype
        self.layers = {name: nn.Linear(IN, out, dtype=dtype) for name, out in OUT.items()}
        self.stack = AdapterStack(self.layers["q"])
        self.fused = FusedLinear(list(self.layers.values()), list(self.layers), self.stack)

    def check(self, newest: list[LoadedAdapter | None], pieces: list[Piece]) -> None:
        num_tokens = max([len(newest), *(piece.tokens.stop for piece in pieces if isinstance(piece.tokens, slice))])
        own = [*newest, *[None] * (num_tokens - len(newest))]
        for piece in pieces:
            own[piece.tokens] = [piece.adapter] * len(own[piece.tokens])  # type: ignore[index,arg-type]
        x = torch.randn(num_tokens, IN).to(self.dtype)
        self.stack.set_plan(newest, pieces)
        expected = torch.stack([self.alone(token, used) for token, used in zip(x, own, strict=True)])
        close = {"rtol": 1e-4, "atol": 1e-4} if self.dtype == torch.float32 else {"rtol": 4e-2, "atol": 4e-1}
        torch.testing.assert_close(self.fused(x).float(), expected, **close)

    def alone(self, token: torch.Tensor, used: LoadedAdapter | None) -> torch.Tensor:
        """In fp32."""
        parts, token = [], token.float()
        for name, layer in self.layers.items():
            bias = layer.bias.float()
            part = token @ layer.weight.float().T + bias
            if used is not None and (factors := used.factors.get(name)) is not None:
                gain = 1 if factors.gain is None else factors.gain
                part = (part + token @ factors.down.float().T @ factors.up.float() - bias) * gain + bias
            parts.append(part)
        return torch.cat(parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_any_mix_of_adapters_in_any_order_of_steps(dtype: torch.dtype) -> None:
    """One stack through rushes and quiet times: slots are taken over, given back and taken by larger ranks."""
    group, draw = Group(dtype), random.Random(1)
    adapters = [adapter(number, dtype) for number in range(40)]
    for num_used in (1, 3, 3, 30, 2, 40, 1):
        used = [*draw.sample(adapters, num_used), None]
        group.check([draw.choice(used) for _ in range(45)], [])


@torch.inference_mode()
def test_a_crowd_with_one_adapter_is_computed_beside_single_tokens() -> None:
    group = Group()
    few = [adapter(number) for number in range(1, 7)]
    newest: list[LoadedAdapter | None] = [adapter(0), *few, None, *[adapter(0)] * 3]
    crowd = adapter(8)
    newest[2:2] = [crowd] * 40
    group.check(newest, [])
    assert [piece.adapter for piece in group.stack.plan.pieces] == [crowd]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_pieces_of_prompts_have_their_own_adapters(dtype: torch.dtype) -> None:
    group, other = Group(dtype), adapter(5, dtype)
    pieces = [Piece(slice(3, 10), adapter(0, dtype)), Piece(slice(14, 20), other)]
    group.check([None, other, adapter(3, dtype)], pieces)


@torch.inference_mode()
def test_a_step_without_adapters_is_the_base_alone() -> None:
    group = Group()
    group.check([adapter(1), None], [])
    group.check([None, None], [])
    assert not group.fused.factors.is_adapted


@pytest.mark.parametrize("num_used", [1, 4])
@torch.inference_mode()
def test_after_a_rush_few_adapters_take_few_slots(num_used: int) -> None:
    """What a step costs follows those that it uses, not the most that there ever were."""
    group = Group()
    adapters = [adapter(number) for number in range(32)]
    group.check(list(adapters), [])
    group.check(list(adapters[-num_used:]), [])
    assert group.stack.plan.spread is not None
    newcomer = adapter(99)
    group.check([*adapters[-num_used:], newcomer], [])
    assert group.stack.plan.spread.num_slots <= 4 + 2 * (num_used + 1)
