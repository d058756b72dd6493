"""The prompts that a model is asked in the checks: pictures of several shapes, text around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from mm_engine.errors import RequestError
from mm_engine.testing.fault import Skip
from mm_engine.testing.sizes import Size, picture

if TYPE_CHECKING:
    from mm_engine.testing.subject import Subject

BEFORE, AFTER = "Look at this: ", " What is in the picture?"


@dataclass(frozen=True, slots=True)
class TestPrompt:
    """Token ids with one placeholder for each image, and the images."""

    __test__ = False  # not a class of tests, whatever pytest makes of the name

    ids: tuple[int, ...]
    images: tuple[Image.Image, ...]


def shapes(subject: Subject) -> list[Size]:
    """A few sizes of different aspect: lying, upright, square, odd; cut where grids cut."""
    side = max((s for s in subject.geometry.sides if s < 1000), default=336)
    sizes = [(2 * side + 7, side - 3), (side - 5, 2 * side + 3), (side, side), (37, 61)]
    grids = [size for size in subject.geometry.grids if max(size) <= 2000]
    sizes += [(width - 11, max(1, height // 2)) for width, height in grids[:2]]
    sizes += [(max(1, width // 3), height) for width, height in grids[-2:]]
    return list(dict.fromkeys(sizes))


def prompts(subject: Subject, answer_len: int) -> list[TestPrompt]:
    """Prompts with one image and with two, that leave room for `answer_len` tokens.

    Raises:
        Skip: not even the smallest image fits in the model's length.
    """
    room = subject.ctx.max_model_len - answer_len - 80
    counts: dict[Size, int] = {}
    for size in shapes(subject):
        try:
            counts[size] = subject.expand([picture(size)])[0]
        except RequestError:  # the plugin doesn't take this shape
            continue
    fitting = [size for size in counts if counts[size] <= room]
    if not fitting:
        raise Skip(f"no image fits in max_model_len, which is {subject.ctx.max_model_len}")
    made = [_prompt(subject, [size]) for size in fitting[:2]]
    by_count = sorted(fitting, key=lambda size: counts[size])
    two = (by_count[0], by_count[-1] if len(by_count) > 1 else by_count[0])
    two = two if sum(counts[size] for size in two) <= room else (by_count[0], by_count[0])
    if subject.ctx.limits["image"] >= 2 and sum(counts[size] for size in two) <= room:
        made.append(_prompt(subject, two))
    return made


def _prompt(subject: Subject, sizes: Sequence[Size]) -> TestPrompt:
    tokenizer = subject.ctx.tokenizer
    ids = list(tokenizer(BEFORE)["input_ids"])
    after = tokenizer.encode(AFTER, add_special_tokens=False)
    for _ in sizes:
        ids += [subject.placeholder_id, *after]
    images = tuple(picture(size, seed) for seed, size in enumerate(sizes))
    return TestPrompt(tuple(ids), images)
