"""What a benchmark asks: random prompts of given lengths, images of given sizes, all from a seed.

Prompt `i` of a workload is the same whoever asks for it and however often. Two prompts share
nothing, so that no cache can flatter, unless the shape says what they share.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

MAX_SIDE = 16_384  # pixels
POOL_SIZE = 1024  # words to draw from
_TEXT, _PREFIX, _SIZE, _SOURCE, _PIXELS = range(5)  # streams of random numbers
_ATTEMPTS = 20  # at a text of the right length
_GRID = 12  # an image is this many random colours a side, drawn large


@dataclass(frozen=True, slots=True)
class ImageSize:
    """Pixels of an image, and how often it is drawn beside other sizes."""

    width: int
    height: int
    weight: float = 1.0

    def __str__(self) -> str:
        return f"{self.width}×{self.height}"


def read_image_size(text: str) -> ImageSize:
    """`336x336`, or with a weight `672x336:3`.

    Raises:
        ValueError: it is neither; the message is for the user.
    """
    found = re.fullmatch(r"(\d{1,5})[x×X](\d{1,5})(?::(\d+(?:\.\d+)?))?", text.strip())
    if found:
        size = ImageSize(int(found[1]), int(found[2]), float(found[3] or 1))
        if 1 <= size.width <= MAX_SIDE and 1 <= size.height <= MAX_SIDE and size.weight > 0:
            return size
    raise ValueError(f"--image-size can't be read: {text}. Write 336x336, or 672x336:3.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What all prompts of a workload have in common; lengths are in tokens."""

    input_len: int  # text, without the prefix
    output_len: int
    prefix_len: int = 0  # the same tokens before every text
    num_images: int = 0  # in each prompt
    image_sizes: tuple[ImageSize, ...] = ()
    image_repeats: float = 0.0  # share of prompts with the images of an earlier one
    seed: int = 0

    def __str__(self) -> str:
        parts = [f"{self.input_len} → {self.output_len} tokens"]
        if self.prefix_len:
            parts.append(f"{self.prefix_len} shared before them")
        if self.num_images:
            sizes = " or ".join(map(str, self.image_sizes))
            parts.append(f"{self.num_images} image{'s' * (self.num_images > 1)} of {sizes}")
        if self.image_repeats:
            parts.append(f"{self.image_repeats:.0%} of the images repeated")
        return " · ".join(parts)


class WordPool:
    """Token ids that are a plain word each, and stay one token beside each other in a text.

    Raises:
        ValueError: the tokenizer has fewer than two tokens that a text can be made of.
    """

    def __init__(self, tokenizer: Any, vocab_size: int | None = None) -> None:
        import numpy as np

        self._tokenizer = tokenizer
        highest = min(len(tokenizer), vocab_size or len(tokenizer))
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        order = np.random.default_rng(0).permutation(highest).tolist()
        for fits in (self._comes_back, self._adds_one):
            words = (t for t in order if t not in special and self._is_word(t) and fits(t))
            ids = list(itertools.islice(words, POOL_SIZE))
            if len(ids) > 1:
                break
        else:
            raise ValueError("the tokenizer has no plain words to make a text of.")
        self.ids = np.array(ids)

    def _is_word(self, token: int) -> bool:
        text = self.text([token])
        return text.isascii() and text.strip(" ").isalpha()

    def _comes_back(self, token: int) -> bool:
        return self.encode(self.text([token, token])) == [token, token]

    def _adds_one(self, token: int) -> bool:
        """For tokenizers that put something before whatever begins a text: nothing comes back."""
        few, more = (len(self.encode(self.text([token] * count))) for count in (2, 4))
        return more - few == 2

    def text(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        decoded = self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return str(decoded)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without those that a tokenizer puts around it."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def draw(self, num_tokens: int, rng: np.random.Generator) -> list[int]:
        """This many random ids."""
        return [int(token) for token in rng.choice(self.ids, num_tokens)]

    def draw_text(self, num_tokens: int, rng: np.random.Generator) -> str:
        """A random text of this many tokens; where words merge beside each other, nearly so."""
        ids = self.draw(num_tokens, rng)
        for _ in range(_ATTEMPTS):
            text = self.text(ids)
            missing = num_tokens - len(self.encode(text))
            if missing == 0:
                break
            ids = [*ids, *self.draw(missing, rng)] if missing > 0 else ids[:missing] or ids[:1]
        return text


class Workload:
    """The prompts of a shape, by index. Those of another `stream` share nothing with them."""

    def __init__(self, shape: Shape, pool: WordPool, *, stream: int = 0) -> None:
        self.shape = shape
        self.pool = pool
        self._stream = stream

    def text_ids(self, index: int) -> list[int]:
        """The ids of prompt `index`'s own text: exactly `input_len`."""
        return self.pool.draw(self.shape.input_len, self._rng(_TEXT, index))

    def prefix_ids(self) -> list[int]:
        """The ids that every prompt begins with."""
        return self.pool.draw(self.shape.prefix_len, self._rng(_PREFIX))

    def text(self, index: int, num_tokens: int) -> str:
        """Prompt `index`'s own text, of `num_tokens`."""
        return self.pool.draw_text(num_tokens, self._rng(_TEXT, index))

    def prefix(self) -> str:
        """The text that every prompt begins with."""
        return self.pool.draw_text(self.shape.prefix_len, self._rng(_PREFIX))

    def source(self, index: int) -> int:
        """The prompt that prompt `index` has its images from: itself, unless it repeats."""
        while index > 0:
            rng = self._rng(_SOURCE, index)
            if rng.random() >= self.shape.image_repeats:
                break
            index = int(rng.integers(index))
        return index

    def images(self, index: int) -> list[Image.Image]:
        """The images of prompt `index`, RGB."""
        if not self.shape.num_images:
            return []
        source = self.source(index)
        weights = [size.weight for size in self.shape.image_sizes]
        shares = [weight / sum(weights) for weight in weights]
        drawn = self._rng(_SIZE, source).choice(len(shares), self.shape.num_images, p=shares)
        sizes = [self.shape.image_sizes[int(number)] for number in drawn]
        return [draw_image(size, self._rng(_PIXELS, source, i)) for i, size in enumerate(sizes)]

    def _rng(self, *numbers: int) -> np.random.Generator:
        import numpy as np

        return np.random.default_rng([self.shape.seed, self._stream, *numbers])


def draw_image(size: ImageSize, rng: np.random.Generator) -> Image.Image:
    """Soft spots of random colours, which compress about as well as a photograph."""
    import numpy as np
    from PIL import Image

    colours = rng.integers(0, 256, (_GRID, _GRID, 3), dtype=np.uint8)
    spots = Image.fromarray(colours).resize((size.width, size.height), Image.Resampling.BICUBIC)
    noise = rng.integers(-8, 9, (size.height, size.width, 1))
    return Image.fromarray((np.asarray(spots) + noise).clip(0, 255).astype(np.uint8))
