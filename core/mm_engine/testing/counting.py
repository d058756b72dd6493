"""How many tokens an image of each size takes, asked of everybody who says so."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from mm_engine.errors import MMEngineError, RequestError
from mm_engine.testing.oracle import Refused
from mm_engine.testing.sizes import Size, picture, sweep

if TYPE_CHECKING:
    from mm_engine.testing.subject import Subject

MAX_WRONG = 25  # sizes with a wrong count after which the sweep ends: it is clear by then


@dataclass(slots=True)
class Count:
    """How many tokens an image of one size takes, by everybody who says so."""

    size: Size
    expanded: int | None = None  # by input_processor
    rows: int | None = None  # by embed_images
    theirs: int | None = None  # by transformers, and the text tokens that stand among its rows
    num_text: int = 0  # tokens of text among the image's
    refused: str = ""  # the plugin doesn't take such an image, and says why
    error: MMEngineError | None = None  # a hook or embed_images failed
    mapped: dict[str, Tensor] | None = None

    @property
    def agree(self) -> bool:
        """Whether all who gave a number gave the same."""
        if self.error is not None:
            return False
        numbers = {self.expanded, self.rows, self.theirs} - {None}
        return bool(self.refused) or len(numbers) == 1

    @property
    def hangs(self) -> bool:
        """Whether a hook was given up on."""
        return self.error is not None and "took longer" in str(self.error)

    @property
    def truth(self) -> int:
        """What transformers says, or else what the model makes."""
        return self.theirs or self.rows or 0


def counted(subject: Subject, size: Size) -> Count:
    """Ask everybody about one size."""
    count, image = Count(size), picture(size)
    if subject.oracle is not None:
        with contextlib.suppress(Refused):  # then the other two are compared
            count.theirs = len(subject.oracle.rows(image))
    try:
        count.mapped = subject.map(image)
        (ids,) = subject.ranges([image], [count.mapped])
        count.expanded, count.num_text = len(ids), len(subject.text_in(ids))
        if count.theirs is not None:
            count.theirs += count.num_text
    except RequestError as error:
        count.refused = str(error)
        return count
    except MMEngineError as error:
        count.error = error
        return count
    try:
        (rows,) = subject.embed([count.mapped])
        count.rows = len(rows)
    except MMEngineError as error:
        count.error = error
    return count


def counts_of(subject: Subject) -> list[Count]:
    """The counts over the whole sweep, made once."""
    if "counts" not in subject.memory:
        found: list[Count] = []
        wrong = 0
        for size in sweep(subject.geometry):
            found.append(counted(subject, size))
            wrong += not found[-1].agree
            if found[-1].hangs or wrong >= MAX_WRONG:
                break
        subject.memory["counts"] = found
    counts: list[Count] = subject.memory["counts"]
    return counts
