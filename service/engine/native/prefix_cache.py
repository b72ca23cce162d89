"""Keys and values of prompts that were read, for the next prompt that begins alike.

Kept in blocks of a few tokens, each named by a hash over its tokens, all tokens before them and the adapter's version:
what one version computed is never found by another. Least recently used blocks go first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy as np
import torch

from service.engine.native.kv_cache import Row
from service.engine.native.paged import PagedRow

BLOCK = 32  # tokens


class PrefixCache:
    """Copies of blocks; at most so many tokens."""

    def __init__(self, max_tokens: int) -> None:
        self._max_blocks = max_tokens // BLOCK
        self._blocks: OrderedDict[bytes, torch.Tensor] = OrderedDict()  # [layers, 2, heads, BLOCK, head size]

    @property
    def num_tokens(self) -> int:
        """Tokens whose states are kept."""
        return BLOCK * len(self._blocks)

    def fill(self, row: Row | PagedRow, token_ids: Sequence[int], adapter_id: str) -> int:
        """Copy what is known of a prompt into its row; returns how many tokens that is. At least one token is left to
        be read: its logits are wanted."""
        for name in _names(token_ids[: len(token_ids) - 1], adapter_id):
            if (block := self._blocks.get(name)) is None:
                break
            row.states(row.length, row.length + BLOCK).copy_(block)
            row.length += BLOCK
        return row.length

    def keep(self, row: Row | PagedRow, token_ids: Sequence[int], adapter_id: str) -> None:
        """Remember the blocks of a prompt that has been read into the row."""
        if not self._max_blocks:
            return
        names = list(_names(token_ids[: row.length], adapter_id))
        for number, name in enumerate(names):
            if name not in self._blocks:
                self._blocks[name] = row.states(number * BLOCK, (number + 1) * BLOCK).clone()
        for name in reversed(names):  # a block is of use only together with those before it: they go last
            self._blocks.move_to_end(name)
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)


def _names(token_ids: Sequence[int], adapter_id: str) -> Iterator[bytes]:
    """Of the whole blocks, in their order."""
    name = adapter_id.encode()
    ids = np.asarray(token_ids, dtype=np.int64)
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        name = blake2b(name + ids[start : start + BLOCK].tobytes(), digest_size=16).digest()
        yield name
