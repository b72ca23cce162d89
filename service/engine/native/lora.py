"""Applying adapters: many at once, each to its own tokens.

Linear layers that read the same input form a group. For the newest tokens, one for each sequence, the factors of all
adapters that are in use lie stacked, so that one batched product per factor serves all adapters, whatever their number
and ranks. A piece of a prompt has one adapter and many tokens: its factors are multiplied by themselves. A step without
adapters pays one `if` per group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

_RANK_MULTIPLE = 8


class Factors(NamedTuple):
    """What an adapter does to one layer: y + x down up, and with DoRA that times `gain` (but for the layer's bias)."""

    down: torch.Tensor  # A^T [in, rank]
    up: torch.Tensor  # B^T [rank, out], the scale inside
    gain: torch.Tensor | None = None  # fp32 [out]: magnitude / length of the row of W + scale * B A


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter's weights on the device, by module name."""

    id: str
    factors: dict[str, Factors]

    @property
    def rank(self) -> int:
        """The largest."""
        return max(factors.down.shape[1] for factors in self.factors.values())

    @property
    def has_gains(self) -> bool:
        """Whether any layer is scaled (DoRA)."""
        return any(factors.gain is not None for factors in self.factors.values())


@dataclass
class LoraPlan:
    """Which tokens of a step use which adapters."""

    slots: int = 0  # of the stack that are computed with
    num_per_slot: int = 0  # newest tokens, padded
    sources: torch.Tensor | None = None  # int64 [slots * num_per_slot]: the token that is computed there
    places: torch.Tensor | None = None  # int64 [tokens]: where each token's result stands; None if all in order
    tokens: torch.Tensor | None = None  # int64 [tokens]: those with an adapter
    slot_of: torch.Tensor | None = None  # int64 [tokens]
    has_gains: bool = False
    pieces: list[tuple[slice, LoadedAdapter]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether no token has an adapter."""
        return self.tokens is None and not self.pieces


class AdapterStack:
    """The adapters of running sequences, stacked, and the plan of the step that runs now; shared by all groups."""

    def __init__(self) -> None:
        self.plan = LoraPlan()
        self.rank = 0
        self.slots: list[LoadedAdapter | None] = []
        self._groups: list[LinearGroup] = []

    def add_group(self, group: LinearGroup) -> None:
        """Let a group's factors be stacked here."""
        self._groups.append(group)

    def make_plan(
        self,
        newest: Sequence[LoadedAdapter | None],
        pieces: list[tuple[slice, LoadedAdapter]],
        device: torch.device,
    ) -> LoraPlan:
        """The plan of a step whose first tokens, one for each sequence, use these adapters."""
        used = Counter(adapter for adapter in newest if adapter is not None)
        plan = LoraPlan(pieces=pieces)
        if not used:
            return plan
        self._seat(list(used))
        slot = {adapter: number for number, adapter in enumerate(self.slots) if adapter in used}
        plan.slots, plan.num_per_slot = 1 + max(slot.values()), max(used.values())
        tokens, places, sources = [], [], [0] * (plan.slots * plan.num_per_slot)
        filled: Counter[int] = Counter()
        for token, adapter in enumerate(newest):
            if adapter is None:
                continue
            place = slot[adapter] * plan.num_per_slot + filled[slot[adapter]]
            filled[slot[adapter]] += 1
            sources[place] = token
            tokens.append(token)
            places.append(place)
        plan.tokens = torch.tensor(tokens, device=device)
        plan.sources = torch.tensor(sources, device=device)
        plan.places = torch.tensor(places, device=device)
        plan.slot_of = plan.places // plan.num_per_slot
        plan.has_gains = any(adapter.has_gains for adapter in used)
        return plan

    def forget(self, adapter: LoadedAdapter) -> None:
        """Drop the stack's hold on an adapter that is no longer resident."""
        self.slots = [None if held is adapter else held for held in self.slots]

    def _seat(self, used: list[LoadedAdapter]) -> None:
        """Give each adapter in use a slot: the one it has, or the first that is not in use."""
        seated = {adapter for adapter in self.slots if adapter is not None}
        newcomers = [adapter for adapter in used if adapter not in seated]
        if not newcomers:
            return
        rank = max(self.rank, *(-(-adapter.rank // _RANK_MULTIPLE) * _RANK_MULTIPLE for adapter in newcomers))
        if rank != self.rank:
            self.rank, self.slots = rank, [None] * len(self.slots)
            newcomers = used
        free = [number for number, held in enumerate(self.slots) if held is None or held not in used]
        while len(free) < len(newcomers):
            free.append(len(self.slots))
            self.slots.append(None)
        for number, adapter in zip(free, newcomers, strict=False):
            self.slots[number] = adapter
            for group in self._groups:
                group.seat(number, len(self.slots), self.rank, adapter)


class LinearGroup:
    """Linear layers, by name, that read the same input and whose outputs lie side by side."""

    def __init__(self, names: tuple[str, ...], in_features: int, out_features: tuple[int, ...], stack: AdapterStack):
        self.names, self.in_features, self.out_features = names, in_features, out_features
        self.bias: torch.Tensor | None = None  # [out of all], which a gain spares
        self._stack = stack
        self._down = self._gain = torch.empty(0)  # [slots, in, members * rank], [slots, out of all]
        self._up: list[torch.Tensor] = []  # [slots, rank, out] of each member
        stack.add_group(self)

    @property
    def is_adapted(self) -> bool:
        """Whether this step has adapters."""
        return not self._stack.plan.is_empty

    def seat(self, slot: int, num_slots: int, rank: int, adapter: LoadedAdapter) -> None:
        """Write an adapter's factors into a slot, zeros where it has none."""
        like = next(iter(adapter.factors.values())).down
        if self._down.shape[0] < num_slots or self._down.shape[-1] != rank * len(self.names):
            self._resize(max(4, 2 * num_slots), rank, like)
        self._down[slot] = 0
        self._gain[slot] = 1
        for member, name in enumerate(self.names):
            self._up[member][slot] = 0
            if (factors := adapter.factors.get(name)) is None:
                continue
            own = factors.down.shape[1]
            self._down[slot, :, member * rank : member * rank + own] = factors.down
            self._up[member][slot, :own] = factors.up
            if factors.gain is not None:
                self._gain[slot, self._columns(member)] = factors.gain

    def _resize(self, num_slots: int, rank: int, like: torch.Tensor) -> None:
        same_rank = self._down.shape[-1] == rank * len(self.names)
        old = [self._down, self._gain, *self._up] if same_rank else []
        self._down = like.new_zeros(num_slots, self.in_features, rank * len(self.names))
        self._gain = torch.ones(num_slots, sum(self.out_features), device=like.device)
        self._up = [like.new_zeros(num_slots, rank, size) for size in self.out_features]
        for new, kept in zip([self._down, self._gain, *self._up], old, strict=False):
            new[: len(kept)] = kept

    def _columns(self, member: int) -> slice:
        start = sum(self.out_features[:member])
        return slice(start, start + self.out_features[member])

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Add to y [tokens, out of all], in place, what the step's adapters make of x [tokens, in]."""
        plan = self._stack.plan
        if plan.tokens is not None:
            self._adapt_newest(plan, x, y)
        for tokens, adapter in plan.pieces:
            for member, name in enumerate(self.names):
                if (factors := adapter.factors.get(name)) is not None:
                    own = y[tokens, self._columns(member)]
                    own += (x[tokens] @ factors.down) @ factors.up
                    if factors.gain is not None:
                        bias = 0 if self.bias is None else self.bias[self._columns(member)]
                        own.copy_((own - bias) * factors.gain + bias)
        return y

    def _adapt_newest(self, plan: LoraPlan, x: torch.Tensor, y: torch.Tensor) -> None:
        assert plan.tokens is not None
        assert plan.sources is not None
        assert plan.places is not None
        assert plan.slot_of is not None
        rank = self._stack.rank
        own = x.index_select(0, plan.sources).view(plan.slots, plan.num_per_slot, -1)
        low = torch.bmm(own, self._down[: plan.slots])
        parts = [
            torch.bmm(low[..., member * rank : (member + 1) * rank], up[: plan.slots])
            for member, up in enumerate(self._up)
        ]
        found = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        y.index_add_(0, plan.tokens, found.flatten(0, 1).index_select(0, plan.places))
        if plan.has_gains:
            gain = self._gain.index_select(0, plan.slot_of)
            bias = 0 if self.bias is None else self.bias
            y[plan.tokens] = ((y[plan.tokens] - bias) * gain + bias).to(y.dtype)


class LoraLinear(nn.Module):
    """Stands in for an `nn.Linear` or `Conv1D`, with the same parameters under the same names."""

    def __init__(self, base: nn.Linear | Conv1D, name: str, stack: AdapterStack) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self._transposed = isinstance(base, Conv1D)
        out_features, in_features = self.rows().shape
        self.group = LinearGroup((name,), in_features, (out_features,), stack)
        self.group.bias = base.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens are counted over all leading dimensions."""
        y = F.linear(x, self.rows(), self.bias)
        if self.group.is_adapted:
            self.group.adapt(x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
        return y

    def rows(self) -> torch.Tensor:
        """The weight as [out, in]."""
        return self.weight.T if self._transposed else self.weight


def attach(model: nn.Module, stack: AdapterStack) -> None:
    """Replace every linear layer of a model."""
    for name, module in list(model.named_modules()):
        if type(module) in (nn.Linear, Conv1D):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, LoraLinear(module, name, stack))


class Linear(NamedTuple):
    """A linear layer that an adapter may target."""

    rows: torch.Tensor  # [out, in]


def linear_layers(model: nn.Module) -> dict[str, Linear]:
    """Every linear layer of a model that was just loaded, by name."""
    return {
        name: Linear(module.weight.T if isinstance(module, Conv1D) else module.weight)
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D)
    }
