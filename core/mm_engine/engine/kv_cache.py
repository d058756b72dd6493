"""Which blocks of the paged KV cache belong to which sequence. The tensors live in the worker."""

from __future__ import annotations

from collections import deque

from mm_engine.sequence import Sequence


class KVCache:
    """A pool of `num_blocks` blocks of `block_size` tokens each, and who owns them.

    Position `p` of a sequence is stored in block `block_table[p // block_size]`, at offset
    `p % block_size`. A sequence keeps all its blocks until `free`, also where a sliding window
    has left them behind.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks >= 1 and block_size >= 1
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = deque(range(num_blocks))
        self._owned = [False] * num_blocks  # guards against a block given twice or freed twice

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that sequences own."""
        return self.num_blocks - len(self._free)

    @property
    def max_tokens(self) -> int:
        """The most tokens that the whole pool holds."""
        return self.num_blocks * self.block_size

    def num_blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.block_size)

    def num_missing_blocks(self, sequence: Sequence, num_new_tokens: int) -> int:
        """How many blocks the next `num_new_tokens` uncomputed tokens need beyond the table."""
        needed = self.num_blocks_for(sequence.num_computed_tokens + num_new_tokens)
        return max(0, needed - len(sequence.block_table))

    def can_append(self, sequence: Sequence, num_new_tokens: int) -> bool:
        """Whether the free blocks suffice for the next `num_new_tokens` uncomputed tokens."""
        return self.num_missing_blocks(sequence, num_new_tokens) <= len(self._free)

    def append(self, sequence: Sequence, num_new_tokens: int) -> None:
        """Grow the block table to cover the next `num_new_tokens`; `can_append` must hold."""
        assert self.can_append(sequence, num_new_tokens)
        for _ in range(self.num_missing_blocks(sequence, num_new_tokens)):
            block = self._free.popleft()
            assert not self._owned[block]
            self._owned[block] = True
            sequence.block_table.append(block)

    def free(self, sequence: Sequence) -> None:
        """Take all of a sequence's blocks back; what they held is lost to it."""
        for block in reversed(sequence.block_table):
            assert self._owned[block]
            self._owned[block] = False
            self._free.append(block)
        sequence.block_table.clear()
