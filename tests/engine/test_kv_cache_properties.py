"""A long random life of the pool beside a plain model of it: who uses what, and what it holds."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mm_engine.engine.kv_cache import KVCache
from mm_engine.request import Item, PlaceholderRange, Request
from mm_engine.sampling_params import SamplingParams
from mm_engine.sequence import Sequence

BLOCK_SIZE = 3
NUM_BLOCKS = 11
NUM_EXAMPLES, NUM_STEPS = 200, 60  # 12,000 operations

tokens = st.lists(st.integers(0, 1), min_size=1, max_size=14)
images = st.sampled_from(["", "a", "b"])  # what stands on tokens 2 to 6, if there are so many
salts = st.sampled_from(["", "other"])


def past(sequence: Sequence, end: int) -> tuple[object, ...]:
    """All that the keys and values of the tokens before `end` depend on."""
    keys = [item.content_key for item in sequence.request.items if item.placeholder.offset < end]
    return (sequence.request.cache_salt, *keys, *sequence.token_ids[:end])


def advance(cache: KVCache, sequence: Sequence, num: int) -> None:
    """Note that the next `num` tokens are computed without a fault."""
    start = sequence.num_computed_tokens
    sequence.num_computed_tokens = start + num
    cache.keep(sequence, start, start + num)


class Pool(RuleBasedStateMachine):
    """Sequences arrive, share, compute, generate, are preempted or aborted; blocks run out."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(NUM_BLOCKS, BLOCK_SIZE)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.content: dict[int, tuple[object, ...]] = {}  # block -> what was computed into it last
        self.num_hits = 0

    @rule(ids=tokens, image=images, salt=salts)
    def arrive(self, ids: list[int], image: str, salt: str) -> None:
        items = ()
        if image and len(ids) >= 7:
            items = (Item(PlaceholderRange("image", 0, 2, 5), image, {}),)
            ids = ids[:2] + [9] * 5 + ids[7:]
        request = Request("r", tuple(ids), SamplingParams(max_tokens=9), items, (), salt)
        self.waiting.append(Sequence(request))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def admit(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.waiting))
        before = self.cache.num_hit_tokens
        found = self.cache.lookup(sequence)
        assert len(found) * BLOCK_SIZE < sequence.num_tokens, "something is left to compute"
        for number, block in enumerate(found, start=1):
            assert self.content[block] == past(sequence, number * BLOCK_SIZE)
        if not self.cache.can_admit(sequence, found):
            return
        self.waiting.remove(sequence)
        self.running.append(sequence)
        first_time = sequence.num_cached_tokens is None
        self.cache.adopt(sequence, found)
        missing = self.cache.num_missing_blocks(sequence, sequence.num_uncomputed_tokens)
        assert missing <= self.cache.num_free_blocks
        assert sequence.num_computed_tokens == len(found) * BLOCK_SIZE
        if first_time:
            self.num_hits += len(found)
        assert self.cache.num_hit_tokens - before == first_time * len(found) * BLOCK_SIZE

    @precondition(lambda self: self.running)
    @rule(data=st.data(), wanted=st.integers(1, 14), fault=st.integers(0, 9))
    def compute(self, data: st.DataObject, wanted: int, fault: int) -> None:
        sequence = data.draw(st.sampled_from(self.running))
        num = min(wanted, sequence.num_uncomputed_tokens)
        table = list(sequence.block_table)
        if num == 0 or not self.cache.append(sequence, num):
            assert sequence.block_table == table, "what can't be had whole is not begun"
            return
        first = sequence.num_computed_tokens // BLOCK_SIZE
        end = sequence.num_computed_tokens + num
        for number, block in enumerate(sequence.block_table[first:], start=first + 1):
            users = [other for other in self.running if block in other.block_table]
            assert users == [sequence], "what is written to belongs to one"
            kept = number * BLOCK_SIZE <= end and fault
            self.content[block] = past(sequence, number * BLOCK_SIZE) if kept else ("broken",)
        if not fault:  # its keys and values are not to be trusted
            self._leave(sequence)
            return
        advance(self.cache, sequence, num)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), token=st.integers(0, 1))
    def generate(self, data: st.DataObject, token: int) -> None:
        sequence = data.draw(st.sampled_from(self.running))
        if sequence.num_uncomputed_tokens == 0:
            sequence.token_ids.append(token)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), num=st.integers(1, 7), right=st.integers(0, 7), token=st.integers(0, 1))
    def draft(self, data: st.DataObject, num: int, right: int, token: int) -> None:
        """A decode with `num` guesses, of which the first `right` are what comes."""
        sequence = data.draw(st.sampled_from(self.running))
        num = min(num, self.cache.room_for(sequence) - 1)
        if sequence.num_uncomputed_tokens != 1 or num < 1:
            return
        assert not self.cache.append(sequence, self.cache.room_for(sequence) + 1)
        assert self.cache.append(sequence, 1 + num)
        first = sequence.num_computed_tokens // BLOCK_SIZE
        for block in sequence.block_table[first:]:
            assert not any(block in o.block_table for o in self.running if o is not sequence)
            self.content[block] = ("broken",)  # until the guesses are known to be right
        advance(self.cache, sequence, 1)
        for _ in range(min(right, num)):
            sequence.token_ids.append(token)
            self.content_of(sequence, first)
            advance(self.cache, sequence, 1)
        self.content_of(sequence, first)
        sequence.token_ids.append(token)
        self.cache.free_unused(sequence)
        assert len(sequence.block_table) == -(-sequence.num_computed_tokens // BLOCK_SIZE)
        assert sequence.num_uncomputed_tokens == 1

    def content_of(self, sequence: Sequence, first: int) -> None:
        """Note what was computed of blocks from the one of number `first` on."""
        num_full = sequence.num_tokens // BLOCK_SIZE
        for number in range(first, num_full):
            self.content[sequence.block_table[number]] = past(sequence, (number + 1) * BLOCK_SIZE)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.running))
        self._leave(sequence)
        sequence.num_computed_tokens = 0
        self.waiting.append(sequence)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self._leave(data.draw(st.sampled_from(self.running)))

    def _leave(self, sequence: Sequence) -> None:
        others = [other for other in self.running if other is not sequence]
        kept = {block for other in others for block in other.block_table}
        freed = len(set(sequence.block_table) - kept)
        assert self.cache.num_freed_by([sequence]) == freed
        before = self.cache.num_free_blocks
        self.cache.free(sequence)
        assert self.cache.num_free_blocks == before + freed
        self.running.remove(sequence)

    @invariant()
    def users_are_counted_exactly(self) -> None:
        for block in range(NUM_BLOCKS):
            users = sum(sequence.block_table.count(block) for sequence in self.running)
            assert self.cache._num_users[block] == users
            assert (block in self.cache._free) == (users == 0)
        assert self.cache.num_freed_by(self.running) == self.cache.num_used_blocks
        assert all(sequence.block_table == [] for sequence in self.waiting)

    @invariant()
    def every_kept_block_is_what_would_be_computed(self) -> None:
        for key, block in self.cache._block_of_key.items():
            assert self.cache._key_of_block[block] == key
            assert self.content[block] != ("broken",)
        assert sum(key is not None for key in self.cache._key_of_block) == (
            self.cache.num_kept_blocks
        )
        keys = list(self.cache._block_of_key.values())
        assert len(set(keys)) == len(keys)
        pasts = [self.content[block] for block in keys]
        assert len(set(pasts)) == len(pasts), "one block for each past"


Pool.TestCase.settings = settings(max_examples=NUM_EXAMPLES, stateful_step_count=NUM_STEPS)
TestPool = Pool.TestCase
