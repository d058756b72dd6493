"""Which blocks of the paged KV cache hold what, and for whom. The tensors live in the worker."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq

from mm_engine.engine.block_keys import BlockKeys
from mm_engine.sequence import Sequence


class KVCache:
    """A pool of `num_blocks` blocks of `block_size` tokens each, who uses them and what they hold.

    Position `p` of a sequence is stored in block `block_table[p // block_size]`, at offset
    `p % block_size`. A sequence keeps all its blocks until `free`, also where a sliding window
    has left them behind.

    A full block that was computed is kept by its key (`BlockKeys`), also after nobody uses it,
    until its place is wanted: free blocks that hold nothing are given out first, then those that
    were used least recently. Sequences that begin with the same blocks share them; nobody writes
    to a full block, so sharing needs no copies. `reuses=False` keeps nothing.

    A `lookup` always leaves the last token of a sequence to be computed: the next token is
    sampled from it.
    """

    def __init__(
        self, num_blocks: int, block_size: int, *, reuses: bool = True, model: str = ""
    ) -> None:
        assert num_blocks >= 1 and block_size >= 1
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.reuses = reuses
        self.num_queried_tokens = 0  # of sequences when they were admitted first
        self.num_hit_tokens = 0  # of these, what was found
        self.num_evictions = 0  # blocks whose content gave way to another
        self._keys_of = BlockKeys(block_size, model)
        self._num_users = [0] * num_blocks
        self._key_of_block: list[bytes | None] = [None] * num_blocks
        self._block_of_key: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # next first

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody uses, whether they hold something or not."""
        return len(self._free)

    @property
    def num_used_blocks(self) -> int:
        """Blocks that sequences use."""
        return self.num_blocks - len(self._free)

    @property
    def num_kept_blocks(self) -> int:
        """Blocks whose content can be found by its key, in use or not."""
        return len(self._block_of_key)

    @property
    def max_tokens(self) -> int:
        """The most tokens that the whole pool holds."""
        return self.num_blocks * self.block_size

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-num_tokens // self.block_size)

    def num_missing_blocks(self, sequence: Sequence, num_new_tokens: int) -> int:
        """Blocks to add before the next `num_new_tokens` uncomputed tokens can be stored."""
        num_tokens = sequence.num_computed_tokens + num_new_tokens
        num_missing = -(-num_tokens // self.block_size) - len(sequence.block_table)
        return num_missing if num_missing > 0 else 0

    def append(self, sequence: Sequence, num_new_tokens: int) -> bool:
        """Grow the block table to cover the next `num_new_tokens`, if the free blocks suffice."""
        num_missing = self.num_missing_blocks(sequence, num_new_tokens)
        if num_missing > len(self._free):
            return False
        for _ in range(num_missing):
            block, _ = self._free.popitem(last=False)
            assert not self._num_users[block]
            self._forget(block)
            self._num_users[block] = 1
            sequence.block_table.append(block)
        return True

    def room_for(self, sequence: Sequence) -> int:
        """The most uncomputed tokens of a sequence that its own and the free blocks can store."""
        num_blocks = len(sequence.block_table) + len(self._free)
        return num_blocks * self.block_size - sequence.num_computed_tokens

    def free(self, sequence: Sequence) -> None:
        """Take a sequence off all its blocks; what they hold stays to be found while it can."""
        self._shrink(sequence, 0)

    def free_unused(self, sequence: Sequence) -> None:
        """Take a sequence off the blocks that hold none of its computed tokens."""
        self._shrink(sequence, self.num_blocks_for(sequence.num_computed_tokens))

    def _shrink(self, sequence: Sequence, num_blocks: int) -> None:
        # From the end: what follows is of no use once what it follows is gone.
        while len(sequence.block_table) > num_blocks:
            block = sequence.block_table.pop()
            assert self._num_users[block]
            self._num_users[block] -= 1
            if not self._num_users[block]:
                self._free[block] = None
                if self._key_of_block[block] is None:
                    self._free.move_to_end(block, last=False)

    def num_freed_by(self, sequences: Iterable[Sequence]) -> int:
        """Blocks that nobody would use if all of `sequences` gave up theirs."""
        uses = Counter(block for sequence in sequences for block in sequence.block_table)
        return sum(self._num_users[block] == number for block, number in uses.items())

    def lookup(self, sequence: Sequence) -> list[int]:
        """The blocks that hold the beginning of a sequence, as far as they do; changes nothing."""
        blocks: list[int] = []
        if self.reuses:
            for number in range(1, self._num_shareable(sequence) + 1):
                block = self._block_of_key.get(self._keys_of.extend(sequence, number)[number - 1])
                if block is None:
                    break
                blocks.append(block)
        return blocks

    def can_admit(
        self, sequence: Sequence, found: Seq[int], *, freed: Iterable[Sequence] = ()
    ) -> bool:
        """Whether all that a sequence has so far finds room, given what `lookup` found of it.

        `freed` are others that could give up their blocks for it.
        """
        uses = Counter(block for other in freed for block in other.block_table)
        num_free = len(self._free)
        num_free += sum(self._num_users[block] == number for block, number in uses.items())
        num_free -= sum(self._num_users[block] == uses[block] for block in found)
        return self.num_blocks_for(sequence.num_tokens) - len(found) <= num_free

    def adopt(self, sequence: Sequence, found: Seq[int]) -> None:
        """Let a sequence without blocks begin with those that `lookup` found."""
        assert not sequence.block_table
        for block in found:
            if not self._num_users[block]:
                del self._free[block]
            self._num_users[block] += 1
            sequence.block_table.append(block)
        sequence.num_computed_tokens = len(found) * self.block_size
        if sequence.num_cached_tokens is None:  # recomputing after preemption isn't a query
            sequence.num_cached_tokens = sequence.num_computed_tokens
            if self.reuses:
                self.num_queried_tokens += sequence.num_tokens
                self.num_hit_tokens += sequence.num_computed_tokens

    def keys_completed_by(self, sequence: Sequence, num_new_tokens: int) -> list[bytes]:
        """Keys of the blocks that the next `num_new_tokens` uncomputed tokens make full."""
        if not self.reuses:
            return []
        start = sequence.num_computed_tokens
        first, end = start // self.block_size, (start + num_new_tokens) // self.block_size
        return self._keys_of.extend(sequence, end)[first:end] if first < end else []

    def key_wanted(self, sequence: Sequence, found: Seq[int]) -> bytes | None:
        """Key of the block behind those that `lookup` found; None: the rest is its own affair."""
        number = len(found)
        if not self.reuses or number >= self._num_shareable(sequence):
            return None
        return self._keys_of.extend(sequence, number + 1)[number]

    def keep(self, sequence: Sequence, start: int, end: int) -> None:
        """Keep the blocks that the tokens from `start` to `end` made full.

        For tokens that are known to be computed without a fault: others are given these blocks
        unseen.
        """
        first, after = start // self.block_size, end // self.block_size
        if first == after or not self.reuses:  # as in most decodes: none is full
            return
        keys = self._keys_of.extend(sequence, after)
        for number in range(first, after):
            block, key = sequence.block_table[number], keys[number]
            if key not in self._block_of_key:  # else computed twice in one step: one is enough
                assert self._key_of_block[block] is None
                self._key_of_block[block] = key
                self._block_of_key[key] = block

    def _num_shareable(self, sequence: Sequence) -> int:
        return (sequence.num_tokens - 1) // self.block_size

    def _forget(self, block: int) -> None:
        key = self._key_of_block[block]
        if key is not None:
            self._key_of_block[block] = None
            del self._block_of_key[key]
            self.num_evictions += 1
