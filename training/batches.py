"""Which examples form which optimizer step, and how a micro-batch lies in memory. No model, no method.

The order depends on (seed, epoch) alone and any step can be asked for directly, so resuming needs no iterator state.
Examples are concatenated without padding; their lengths travel along, and the model keeps them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, Protocol

import numpy as np
import torch


class Examples(Protocol):
    """Tokenised examples, as `datasets.Dataset` gives them: columns `input_ids` and `trained` of equal lengths, and
    `lengths` of the sequences that an example consists of; a method may have a column `reference`, a number for each
    sequence, or `label`, one for each example."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: list[int]) -> dict[str, list[Any]]: ...


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The sequences of some examples in one row, longest first. Position i is kept when the token after it, in its
    sequence, is trained."""

    input_ids: torch.Tensor  # int64 [num_tokens]
    lengths: tuple[int, ...]  # tokens of each sequence
    keep: torch.Tensor  # bool [num_tokens]
    targets: torch.Tensor  # int64 [number of kept positions]
    num_targets: tuple[int, ...]  # kept positions of each sequence
    places: tuple[int, ...]  # where the sequences lie in the row, in the order of the examples
    reference: torch.Tensor | None  # float32 [number of sequences], in the order of the examples
    labels: torch.Tensor | None  # int64 [number of examples]
    num_examples: int

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device."""
        if device.type == "cpu":
            return self
        ids, keep, targets = (x.to(device, non_blocking=True) for x in (self.input_ids, self.keep, self.targets))
        reference, labels = (
            None if x is None else x.to(device, non_blocking=True) for x in (self.reference, self.labels)
        )
        return replace(self, input_ids=ids, keep=keep, targets=targets, reference=reference, labels=labels)


def collate(rows: dict[str, list[Any]]) -> MicroBatch:
    """Concatenate sequences. Equal lengths become neighbours, so that attention can take them together."""
    ids = _sequences(rows, "input_ids", np.int64)
    trained = _sequences(rows, "trained", np.bool_)
    order = sorted(range(len(ids)), key=lambda i: (-len(ids[i]), i))
    # The first token of a sequence has nothing before it that could predict it.
    keep = [np.append(trained[i][1:], False) for i in order]
    flat_ids, flat_keep = np.concatenate([ids[i] for i in order]), np.concatenate(keep)
    return MicroBatch(
        input_ids=torch.from_numpy(flat_ids),
        lengths=tuple(len(ids[i]) for i in order),
        keep=torch.from_numpy(flat_keep),
        targets=torch.from_numpy(np.roll(flat_ids, -1)[flat_keep]),
        num_targets=tuple(int(part.sum()) for part in keep),
        places=tuple(np.argsort(order).tolist()),
        reference=torch.tensor(rows["reference"]).flatten() if "reference" in rows else None,
        labels=torch.tensor(rows["label"]) if "label" in rows else None,
        num_examples=len(rows["lengths"]),
    )


def _sequences(rows: dict[str, list[Any]], column: str, dtype: type[np.generic]) -> list[np.ndarray]:
    """A column's values, sequence by sequence."""
    parts: list[np.ndarray] = []
    for values, lengths in zip(rows[column], rows["lengths"], strict=True):
        parts += np.split(np.asarray(values, dtype=dtype), np.cumsum(lengths)[:-1])
    return parts


def split(items: Sequence[int], num_parts: int) -> list[list[int]]:
    """At most `num_parts` non-empty consecutive parts of nearly equal size."""
    return [part.tolist() for part in np.array_split(np.asarray(items, dtype=np.int64), num_parts) if len(part)]


class Batches:
    """The optimizer steps of a run, as one rank sees them."""

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        n_epochs: int,
        seed: int,
        num_micro_batches: int = 1,
        rank: int = 0,
        num_workers: int = 1,
        num_shares: int = 1,
    ) -> None:
        """A step is cut into `num_shares` (or `num_workers`, if that is more) shares of `num_micro_batches` each, which
        are dealt out to the workers: fewer workers take more micro-batches, and those stay the same."""
        self._examples, self._batch_size, self._seed = examples, batch_size, seed
        self._num_micro_batches, self._rank, self._num_workers = num_micro_batches, rank, num_workers
        self._num_shares = max(num_shares, num_workers)
        self.steps_per_epoch = -(-len(examples) // batch_size)
        self.total_steps = n_epochs * self.steps_per_epoch
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def indices(self, step: int) -> list[int]:
        """Examples of one step (1-based) over all ranks."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self._examples)))
        return self._order[1][position * self._batch_size : (position + 1) * self._batch_size].tolist()

    def micro_batches(self, step: int) -> list[MicroBatch]:
        """This rank's share of one step; empty when a short last batch leaves nothing for it."""
        indices = self.indices(step)
        shares = [
            split(indices[first :: self._num_shares], self._num_micro_batches) for first in range(self._num_shares)
        ]
        parts = [part for round_ in zip_longest(*shares) for part in round_ if part is not None]
        return [collate(self._examples[part]) for part in parts[self._rank :: self._num_workers]]
