"""Drafts for speculative decoding, from what a sequence has said or been told: n-gram lookup.

An answer that quotes its prompt, or itself, goes on as the quoted text does. So the newest tokens
are looked up in all that came before, and what followed them there is the draft
(https://github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

from mm_engine.sequence import Sequence


@dataclass(slots=True)
class NgramIndex:
    """Where each n-gram of one sequence was seen last, up to some position."""

    next_of: dict[tuple[int, ...], int] = field(default_factory=dict)  # n-gram -> position behind
    end: int = 1  # n-grams that end before this position are in `next_of`


class PromptLookup:
    """Proposes up to `max_draft` tokens: what followed the newest n-gram where it came last.

    Of the n-grams that end with the newest token, from `longest` tokens down to `shortest`, the
    longest that was seen before counts. Placeholders are no text: an n-gram holds none, none is
    ever proposed, and an occurrence right before one is passed over.

    Tokens are looked at when they are new; a call costs a few lookups, however long the prompt.
    An index takes some 200 bytes for each token and each length of n-gram.
    """

    def __init__(self, max_draft: int, *, longest: int, shortest: int) -> None:
        assert max_draft >= 1 and longest >= shortest >= 1
        self.max_draft = max_draft
        self.longest = longest
        self.shortest = shortest

    def propose(self, sequence: Sequence, max_draft: int) -> tuple[int, ...]:
        """The draft for what follows the sequence's tokens: at most `max_draft`, maybe empty."""
        max_draft = min(max_draft, self.max_draft)
        if max_draft < 1:
            return ()
        index = self._index(sequence)
        ids, end = sequence.token_ids, sequence.num_tokens
        longest = min(self.longest, end - _text_start(sequence, end))
        for length in range(longest, self.shortest - 1, -1):
            start = index.next_of.get(tuple(ids[end - length :]))
            if start is not None:
                return _continuation(sequence, start, max_draft)
        return ()

    def _index(self, sequence: Sequence) -> NgramIndex:
        """The index of all n-grams that something follows: that end before the last token."""
        index: NgramIndex = sequence.ngrams or NgramIndex()
        sequence.ngrams = index
        ids = sequence.token_ids
        for begin, end in _text_runs(sequence, index.end):
            for length in range(self.shortest, self.longest + 1):
                # Tokens of a run, but for its last: nothing that could be proposed follows that.
                first = max(begin, index.end - length)
                ngrams = zip(*(ids[first + i : end - 1] for i in range(length)), strict=False)
                index.next_of.update(zip(ngrams, range(first + length, end), strict=False))
        index.end = max(index.end, sequence.num_tokens)
        return index


def _text_runs(sequence: Sequence, start: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each text without a placeholder in it, from the one around `start` on."""
    items = sequence.request.items
    number = bisect_left(items, start, key=lambda item: item.placeholder.offset)
    begin = items[number - 1].placeholder.end if number else 0
    for item in items[number:]:
        yield begin, item.placeholder.offset
        begin = item.placeholder.end
    yield begin, sequence.num_tokens


def _text_start(sequence: Sequence, end: int) -> int:
    """Where the text that stands right before `end` begins: behind the last placeholder."""
    items = sequence.request.items
    number = bisect_right(items, end - 1, key=lambda item: item.placeholder.offset)
    return items[number - 1].placeholder.end if number else 0


def _continuation(sequence: Sequence, start: int, max_draft: int) -> tuple[int, ...]:
    """The text from `start` on; where it reaches the sequence's end, it repeats itself."""
    items = sequence.request.items
    number = bisect_right(items, start, key=lambda item: item.placeholder.offset)
    if number < len(items):
        max_draft = min(max_draft, items[number].placeholder.offset - start)
    found = sequence.token_ids[start : start + max_draft]
    period = len(found)
    return tuple(found[i % period] for i in range(max_draft))
