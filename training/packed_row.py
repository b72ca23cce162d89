"""How a micro-batch is shown to a model whose attention keeps sequences apart: one row, with positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from training.batches import MicroBatch


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
