"""What decides the keys and values in a block, as one SHA-256. Never truncated, never `hash()`."""

from __future__ import annotations

import hashlib
import struct
from array import array
from bisect import bisect_right
from collections.abc import Iterator

from mm_engine.request import Item, Request
from mm_engine.sequence import UNKNOWN_TOKEN, Sequence


class BlockKeys:
    """Keys of full blocks of `block_size` tokens; `model` names all that the weights depend on.

    A block's key is over the key of the block before it, its token ids, and the content keys,
    offsets and lengths of the items that overlap it. The first block's parent is over `model` and
    the request's `cache_salt`. So equal keys mean: the same tokens and images, from the prompt's
    beginning to the block's end, for the same model and the same tenant.
    """

    def __init__(self, block_size: int, model: str) -> None:
        self.block_size = block_size
        self._model = _frame(model)

    def extend(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        """The keys of a sequence's first `num_blocks` blocks at least; known ones aren't redone."""
        keys, size = sequence.block_keys, self.block_size
        request, ids = sequence.request, sequence.token_ids
        assert num_blocks * size <= len(ids)
        while len(keys) < num_blocks:
            start = len(keys) * size
            digest = hashlib.sha256(keys[-1] if keys else self._root(request))
            content = ids[start : start + size]
            assert UNKNOWN_TOKEN not in content, "a block of tokens that nobody knows"
            digest.update(array("q", content))
            for item in _overlapping(request.items, start, start + size):
                place = item.placeholder
                digest.update(_frame(item.content_key))
                digest.update(struct.pack("<qq", place.offset - start, place.length))
            keys.append(digest.digest())
        return keys

    def _root(self, request: Request) -> bytes:
        return hashlib.sha256(self._model + _frame(request.cache_salt)).digest()


def _frame(text: str) -> bytes:
    """The text with its length before it, so that no two lists of texts run together."""
    encoded = text.encode("utf-8", "surrogatepass")
    return len(encoded).to_bytes(8, "little") + encoded


def _overlapping(items: tuple[Item, ...], start: int, end: int) -> Iterator[Item]:
    first = bisect_right(items, start, key=lambda item: item.placeholder.end)
    for item in items[first:]:
        if item.placeholder.offset >= end:
            break  # items come in order of offset
        yield item
