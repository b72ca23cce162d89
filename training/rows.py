"""How a micro-batch is shown to a model: as one row, where attention keeps sequences apart, or as padded rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from training.batches import MicroBatch

_SHORTEST_SHARE = 0.7  # of the longest sequence among padded rows, so that at most 3 of 10 positions are padding


class PackedRow(NamedTuple):
    """All sequences one after the other, and on a CPU perhaps one more of padding, which nobody looks at."""

    input_ids: torch.Tensor  # int64 [1, tokens]
    positions: torch.Tensor  # int64 [1, tokens]: within its sequence
    lengths: tuple[int, ...]


def packed_row(batch: MicroBatch) -> PackedRow:
    """The row of a micro-batch; what it was padded with comes last."""
    input_ids, lengths = batch.input_ids, batch.lengths
    positions = torch.cat([torch.arange(length) for length in lengths])
    if input_ids.device.type == "cpu" and (num_more := num_until_known_shape(len(input_ids))):
        input_ids, positions = (pad(x, (0, num_more)) for x in (input_ids, positions))
        lengths += (num_more,)
    return PackedRow(input_ids[None], positions.to(input_ids.device)[None], lengths)


def num_until_known_shape(num_rows: int) -> int:
    """How many rows are missing to one of few numbers of rows, at most one in 16 of many.

    On a CPU, oneDNN compiles a matrix product anew for every shape that it meets (2 ms) and keeps it (0.5 MB)."""
    multiple = min(512, max(64, (1 << num_rows.bit_length()) // 32))
    return -num_rows % multiple


class PaddedRows(NamedTuple):
    """Sequences of similar lengths, one in a row, padded on the right."""

    input_ids: torch.Tensor  # int64 [sequences, tokens of the longest]
    mask: torch.Tensor  # int64, the same shape: 1 on tokens, 0 on padding
    lengths: tuple[int, ...]


def padded_rows(batch: MicroBatch, pad_id: int) -> Iterator[PaddedRows]:
    """A micro-batch's sequences, which come longest first, in their order."""
    sequences = batch.input_ids.split(batch.lengths)
    for first, end in _groups(batch.lengths):
        input_ids = pad_sequence(list(sequences[first:end]), batch_first=True, padding_value=pad_id)
        lengths = torch.tensor(batch.lengths[first:end], device=input_ids.device)
        mask = (torch.arange(input_ids.shape[1], device=input_ids.device)[None] < lengths[:, None]).long()
        yield PaddedRows(input_ids, mask, batch.lengths[first:end])


def _groups(lengths: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Borders of groups of neighbours."""
    first = 0
    for place, length in enumerate(lengths):
        if length < _SHORTEST_SHARE * lengths[first]:
            yield first, place
            first = place
    yield first, len(lengths)
