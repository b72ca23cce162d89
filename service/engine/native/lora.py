"""Applying adapters: many at once, each to its own tokens.

Linear layers that read the same input form a group. For the newest tokens, one of each sequence, a bf16 model on a CPU
has a kernel that reads each adapter's factors where they are. Elsewhere the factors of all adapters in use lie stacked,
so that one batched product per factor serves all adapters, whatever their number and ranks. Many tokens with one
adapter, as in a piece of a prompt, are multiplied with its factors by themselves. A step without adapters pays one `if`
per group.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from service.engine.native.cpu_kernels import AdaptedTokens, CpuKernels, kernels_for

_RANK_MULTIPLE = 8
_NOBODY = ""
_MANY = 128  # tokens of a piece from which products of whole matrices are faster than the kernel


class Factors(NamedTuple):
    """What an adapter does to one layer: y + x down up, and with DoRA that times `gain` (but for the layer's bias)."""

    down: torch.Tensor  # A [rank, in]
    up: torch.Tensor  # B^T [rank, out], the scale inside
    gain: torch.Tensor | None = None  # fp32 [out]: magnitude / length of the row of W + scale * B A

    def addresses(self) -> tuple[int, int, int, int]:
        """Where they lie, and the rank."""
        assert self.down.is_contiguous()
        assert self.up.is_contiguous()
        gain = 0 if self.gain is None else self.gain.data_ptr()
        return self.down.data_ptr(), self.up.data_ptr(), gain, len(self.down)


@dataclass(eq=False)
class LoadedAdapter:
    """An adapter's weights on the device, by module name."""

    id: str
    factors: dict[str, Factors]

    def __post_init__(self) -> None:
        self.rank = max(len(factors.down) for factors in self.factors.values())
        self.has_gains = any(factors.gain is not None for factors in self.factors.values())  # DoRA


Tokens = slice | torch.Tensor  # some of the flat row


class Piece(NamedTuple):
    """Many tokens with one adapter."""

    tokens: Tokens
    adapter: LoadedAdapter


class Spread(NamedTuple):
    """Single tokens with many adapters, computed in slots of equal size."""

    num_slots: int  # of the stack, the first ones
    tokens: Tokens
    sources: Tokens  # [slots * tokens of a slot]: the token that is computed there, any where there is none
    places: Tokens  # [tokens]: where each token is computed
    slot_of: torch.Tensor  # int64 [tokens]


@dataclass
class LoraPlan:
    """Which tokens of a step use which adapters."""

    pieces: list[Piece] = field(default_factory=list)
    spread: Spread | None = None
    listed: AdaptedTokens | None = None  # for the kernel
    has_gains: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether no token has an adapter."""
        return self.spread is None and self.listed is None and not self.pieces


class AdapterStack:
    """The adapters of running sequences, stacked, and the plan of the step that runs now; shared by all groups."""

    def __init__(self, model: nn.Module, *, keeps_first_empty: bool = False) -> None:
        """`keeps_first_empty`: no adapter gets the first slot; see `slots_of`."""
        self.version = 0  # grows when stacked factors move to other memory
        weight = next(model.parameters())
        self.device = weight.device
        # On a CPU, small products of bf16 take three times as long as those of fp32.
        self.dtype = torch.float32 if self.device.type == "cpu" else weight.dtype
        self.plan = LoraPlan()
        self.rank = 0
        self._held: list[str | None] = [_NOBODY] if keeps_first_empty else []  # the id of each slot's adapter
        self._groups: list[GroupFactors] = []
        self._names: set[str] = set()  # of all groups' layers
        self._max_members = 0  # layers of any group
        self._kernels = kernels_for(weight)
        self._tables: WeakKeyDictionary[LoadedAdapter, torch.Tensor] = WeakKeyDictionary()

    def add_group(self, group: GroupFactors) -> int:
        """Let a group's factors be found here; returns how many layers the groups before it have."""
        self._groups.append(group)
        first = len(self._names)
        self._names.update(group.names)
        self._max_members = max(self._max_members, len(group.names))
        return first

    def set_plan(self, newest: Sequence[LoadedAdapter | None], pieces: list[Piece]) -> None:
        """Prepare a step whose first tokens, one for each sequence, use these adapters."""
        newest = [adapter if self._is_target(adapter) else None for adapter in newest]
        pieces = [piece for piece in pieces if self._is_target(piece.adapter)]
        has_gains = any(used is not None and used.has_gains for used in (*newest, *(p.adapter for p in pieces)))
        if self._kernels is not None:
            long = [piece for piece in pieces if len(_span(piece)) >= _MANY]
            short = [piece for piece in pieces if len(_span(piece)) < _MANY]
            self.plan = LoraPlan(
                long, listed=self._listed(self._kernels, newest, short, has_gains), has_gains=has_gains
            )
            return
        self.plan = LoraPlan(list(pieces), has_gains=has_gains)
        used = {adapter.id: adapter for adapter in newest if adapter is not None}
        counts = Counter(adapter.id for adapter in newest if adapter is not None)
        for id, count in counts.most_common():
            if len(counts) * count <= 2 * counts.total() + 16:  # slots of equal size waste little
                break
            tokens = [token for token, adapter in enumerate(newest) if adapter is not None and adapter.id == id]
            self.plan.pieces.append(Piece(self._tokens(tokens), used.pop(id)))
            del counts[id]
        if used:
            self._seat(used)
            self.plan.spread = self._spread(newest, used, size=max(counts.values()))

    def slots_of(self, newest: Sequence[LoadedAdapter | None]) -> list[int]:
        """The slots of the adapters of tokens, which are put there where they are missing; the first for tokens without
        one, whose factors are zeros."""
        assert self._held[0] == _NOBODY
        targets = [adapter if self._is_target(adapter) else None for adapter in newest]
        used = {adapter.id: adapter for adapter in targets if adapter is not None}
        if used:
            self._seat(used)
        slots = {id: self._held.index(id) for id in used}
        return [0 if adapter is None else slots[adapter.id] for adapter in targets]

    def _is_target(self, adapter: LoadedAdapter | None) -> bool:
        """Whether it changes any layer here."""
        return adapter is not None and not self._names.isdisjoint(adapter.factors)

    def _listed(
        self, kernels: CpuKernels, newest: Sequence[LoadedAdapter | None], pieces: list[Piece], has_gains: bool
    ) -> AdaptedTokens | None:
        """The tokens by adapter; None if none has one."""
        by_adapter: defaultdict[LoadedAdapter, list[int]] = defaultdict(list)
        for piece in pieces:
            by_adapter[piece.adapter] += _span(piece)
        for token, adapter in enumerate(newest):
            if adapter is not None:
                by_adapter[adapter].append(token)
        if not by_adapter:
            return None
        max_rank = max(adapter.rank for adapter in by_adapter)
        return AdaptedTokens(
            kernels,
            tokens=torch.tensor([token for tokens in by_adapter.values() for token in tokens]),
            starts=torch.tensor([0, *accumulate(map(len, by_adapter.values()))]),
            factors=torch.stack([self._table(adapter) for adapter in by_adapter]),
            max_rank=max_rank,
            max_members=self._max_members,
            is_scaled=has_gains,
        )

    def _table(self, adapter: LoadedAdapter) -> torch.Tensor:
        """int64 [layers of all groups, 4]: where an adapter's factors lie."""
        if (table := self._tables.get(adapter)) is None:
            found = (adapter.factors.get(name) for group in self._groups for name in group.names)
            rows = [(0, 0, 0, 0) if factors is None else factors.addresses() for factors in found]
            table = self._tables[adapter] = torch.tensor(rows)
        return table

    def _spread(self, newest: Sequence[LoadedAdapter | None], used: dict[str, LoadedAdapter], size: int) -> Spread:
        """The tokens whose adapters are in `used`, at most `size` with each."""
        slots = {id: self._held.index(id) for id in used}
        num_slots = 1 + max(slots.values())
        sources, filled = [0] * (num_slots * size), [0] * num_slots
        tokens, places = [], []
        for token, adapter in enumerate(newest):
            if adapter is not None and (slot := slots.get(adapter.id)) is not None:
                place = slot * size + filled[slot]
                filled[slot] += 1
                sources[place] = token
                tokens.append(token)
                places.append(place)
        slot_of = torch.tensor(places, device=self.device) // size
        return Spread(num_slots, self._tokens(tokens), self._tokens(sources), self._tokens(places), slot_of)

    def _tokens(self, numbers: list[int]) -> Tokens:
        """A slice if they follow one another: it costs no copies."""
        if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            return slice(numbers[0], numbers[-1] + 1)
        return torch.tensor(numbers, device=self.device)

    def _seat(self, used: dict[str, LoadedAdapter]) -> None:
        """Give each adapter in use a slot: the one it has, or the first that is not in use."""
        last = max((slot for slot, id in enumerate(self._held) if id in used), default=0)
        rank = max(self.rank, *(-(-adapter.rank // _RANK_MULTIPLE) * _RANK_MULTIPLE for adapter in used.values()))
        if rank != self.rank or last > 4 + 2 * len(used):  # all anew; after a rush, so that few take few slots
            self.rank, self._held = rank, [_NOBODY if id == _NOBODY else None for id in self._held]
        newcomers = [id for id in used if id not in self._held]
        free = [slot for slot, id in enumerate(self._held) if id not in used and id != _NOBODY]
        while len(free) < len(newcomers):
            free.append(len(self._held))
            self._held.append(None)
        for slot, id in zip(free, newcomers, strict=False):
            self._held[slot] = id
            for group in self._groups:
                group.seat(slot, rank, used[id])


class GroupFactors:
    """The stacked factors of linear layers, by name, that read the same input; their outputs lie side by side."""

    def __init__(
        self,
        names: tuple[str, ...],
        in_features: int,
        out_features: tuple[int, ...],
        bias: torch.Tensor | None,
        stack: AdapterStack,
    ) -> None:
        self.names, self.in_features, self.out_features = names, in_features, out_features
        self._bias = bias  # [out of all], which a gain spares
        self._stack = stack
        self._down = self._gain = torch.empty(0)  # [slots, members * rank, in], [slots, out of all]
        self._up: list[torch.Tensor] = []  # [slots, rank, out] of each member
        self.first = stack.add_group(self)  # number of the first layer, over all groups
        self.columns_at = torch.tensor([0, *accumulate(out_features)])  # where each layer's outputs begin

    @property
    def is_adapted(self) -> bool:
        """Whether this step has adapters."""
        return not self._stack.plan.is_empty

    @property
    def is_scaled(self) -> bool:
        """Whether one of them scales what a layer says, so that nothing else may be in it yet."""
        return self._stack.plan.has_gains

    def seat(self, slot: int, rank: int, adapter: LoadedAdapter) -> None:
        """Write an adapter's factors into a slot, zeros where it has none."""
        if slot >= len(self._gain) or self._down.shape[1] != rank * len(self.names):
            self._resize(max(4, len(self._gain), 2 * slot), rank)
        self._down[slot] = 0
        self._gain[slot] = 1
        for member, name in enumerate(self.names):
            self._up[member][slot] = 0
            if (factors := adapter.factors.get(name)) is None:
                continue
            own = len(factors.down)
            self._down[slot, member * rank : member * rank + own] = factors.down
            self._up[member][slot, :own] = factors.up
            if factors.gain is not None:
                self._gain[slot, self._columns(member)] = factors.gain

    def _resize(self, num_slots: int, rank: int) -> None:
        """Zeros where there is no adapter: what is computed in vain must be finite."""
        self._stack.version += 1
        has_same_rank = len(self._gain) and self._down.shape[1] == rank * len(self.names)
        old = [self._down, self._gain, *self._up] if has_same_rank else []
        dtype, device = self._stack.dtype, self._stack.device
        self._down = torch.zeros(num_slots, rank * len(self.names), self.in_features, dtype=dtype, device=device)
        self._gain = torch.ones(num_slots, sum(self.out_features), device=device)
        self._up = [torch.zeros(num_slots, rank, size, dtype=dtype, device=device) for size in self.out_features]
        for new, kept in zip([self._down, self._gain, *self._up], old, strict=False):
            new[: len(kept)] = kept

    def _columns(self, member: int) -> slice:
        start = sum(self.out_features[:member])
        return slice(start, start + self.out_features[member])

    def adapt(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Add to y [tokens, out of all], in place, what the step's adapters make of x [tokens, in]."""
        plan = self._stack.plan
        for piece in plan.pieces:
            self._adapt_piece(piece, x, y)
        if (listed := plan.listed) is not None:
            bias = 0 if self._bias is None else self._bias.data_ptr()
            listed.adapt(y, x, bias, self.first, self.columns_at.data_ptr(), len(self.names))
        if plan.spread is not None:
            self._adapt_spread(plan.spread, x, y)
        return y

    def _adapt_piece(self, piece: Piece, x: torch.Tensor, y: torch.Tensor) -> None:
        x, own = _taken(x, piece.tokens), _taken(y, piece.tokens)
        for member, name in enumerate(self.names):
            if (factors := piece.adapter.factors.get(name)) is not None:
                columns = own[:, self._columns(member)]
                columns.addmm_(x @ factors.down.T, factors.up)
                if factors.gain is not None:
                    _scale(columns, factors.gain, None if self._bias is None else self._bias[self._columns(member)])
        if not isinstance(piece.tokens, slice):
            y.index_copy_(0, piece.tokens, own)

    def _adapt_spread(self, spread: Spread, x: torch.Tensor, y: torch.Tensor) -> None:
        num, rank = spread.num_slots, self._stack.rank
        own = _taken(x, spread.sources).to(self._stack.dtype).view(num, -1, self.in_features)
        low = torch.bmm(own, self._down[:num].transpose(1, 2))
        parts = [
            torch.bmm(low[..., member * rank : (member + 1) * rank], up[:num]) for member, up in enumerate(self._up)
        ]
        found = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).flatten(0, 1)
        adapted = _taken(y, spread.tokens).add_(_taken(found, spread.places))
        if self._stack.plan.has_gains:
            _scale(adapted, self._gain.index_select(0, spread.slot_of), self._bias)
        if not isinstance(spread.tokens, slice):
            y.index_copy_(0, spread.tokens, adapted)


def _span(piece: Piece) -> range:
    """The tokens of a piece of a prompt, which follow one another."""
    assert isinstance(piece.tokens, slice)
    return range(piece.tokens.start, piece.tokens.stop)


def _taken(x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """Some rows: of a slice a view, of a tensor a copy."""
    return x[tokens] if isinstance(tokens, slice) else x.index_select(0, tokens)


def _scale(y: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor | None) -> None:
    """y = (y - bias) gain + bias, in place."""
    shift = 0 if bias is None else bias
    y.copy_((y - shift) * gain + shift)
