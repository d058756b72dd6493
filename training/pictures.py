"""Pictures of one to three plain objects, and questions about them with exact answers.

Everything follows from an integer seed. Seeds below ``EVALUATION_SEEDS_FROM`` are for training
and the others for evaluation; ``training_rng`` and ``evaluation_rng`` refuse the wrong side, so
that no evaluated picture can have been trained on.

Positions and sizes are fractions: x of the width, y of the height, radius of the shorter side.
One scene can so be drawn at any size and aspect.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

FloatArray = npt.NDArray[np.float32]
QuestionAnswer = tuple[str, str, str]

EVALUATION_SEEDS_FROM = 1_000_000_000

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (218, 38, 42),
    "green": (34, 160, 62),
    "blue": (38, 82, 222),
    "yellow": (242, 224, 48),
    "purple": (142, 46, 176),
    "orange": (248, 138, 22),
    "black": (14, 14, 16),
    "white": (248, 248, 246),
}
SIZES = ("small", "large")
RADII = {"small": (0.10, 0.12), "large": (0.165, 0.19)}
KINDS = ("colour", "shape", "count", "count_colour", "relation", "caption")

MAX_OBJECTS = 3
MIN_SEPARATION = 0.12
"""Least distance between two centres along an axis for which their order is called clear."""
GAP = 0.03
"""Least gap between two objects, as a fraction of the side."""

CAPTION_QUESTIONS = (
    "Describe the image.",
    "Describe this image.",
    "Describe the picture.",
    "What is in this image?",
    "What is in the picture?",
    "What do you see?",
)


@dataclass(frozen=True)
class Object:
    """One drawn object; ``x``, ``y`` and ``radius`` are fractions, ``rgb`` its exact colour."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]

    @property
    def phrase(self) -> str:
        """Return the object as a caption names it, such as ``small red circle``."""
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a picture shows: objects from left to right on a grey background.

    ``noise`` is the standard deviation of the background in grey levels, 0 for a plain one, and
    ``noise_seed`` makes it the same each time that the scene is drawn at the same size.
    """

    objects: tuple[Object, ...]
    grey: int
    noise: float
    noise_seed: int


def training_rng(seed: int) -> np.random.Generator:
    """Return the generator for a training picture; raises ValueError for an evaluation seed."""
    if not 0 <= seed < EVALUATION_SEEDS_FROM:
        raise ValueError(f"not a training seed: {seed}. Use 0 to {EVALUATION_SEEDS_FROM - 1}.")
    return np.random.default_rng(seed)


def evaluation_rng(seed: int) -> np.random.Generator:
    """Return the generator for an evaluation picture; raises ValueError for a training seed."""
    if seed < EVALUATION_SEEDS_FROM:
        raise ValueError(f"not an evaluation seed: {seed}. Use {EVALUATION_SEEDS_FROM} or more.")
    return np.random.default_rng(seed)


def random_scene(rng: np.random.Generator) -> Scene:
    """Return a scene of one to three objects that don't overlap, ordered from left to right.

    Centres are at least ``MIN_SEPARATION`` apart along x. Colours and shapes repeat more often
    than independent draws would make them, so that counting has something to count.
    """
    num_objects = int(rng.choice((1, 2, 3), p=(0.2, 0.35, 0.45)))
    while True:
        sizes = [SIZES[int(rng.integers(2))] for _ in range(num_objects)]
        radii = np.array([rng.uniform(*RADII[size]) for size in sizes])
        margin = radii + 0.01
        centres = margin[:, None] + rng.random((num_objects, 2)) * (1 - 2 * margin[:, None])
        if _apart(centres, radii):
            break
    colours = _draw_names(rng, tuple(COLOURS), num_objects, repeat=0.4)
    shapes = _draw_names(rng, SHAPES, num_objects, repeat=0.1)
    objects = []
    for i in np.argsort(centres[:, 0]):
        jitter = rng.integers(-8, 9, size=3)
        rgb = np.clip(np.array(COLOURS[colours[i]]) + jitter, 0, 255)
        objects.append(
            Object(
                shape=shapes[i],
                colour=colours[i],
                size=sizes[i],
                x=float(centres[i, 0]),
                y=float(centres[i, 1]),
                radius=float(radii[i]),
                rgb=(int(rgb[0]), int(rgb[1]), int(rgb[2])),
            )
        )
    return Scene(
        objects=tuple(objects),
        grey=int(rng.integers(95, 166)),
        noise=float(rng.uniform(2, 12)) if rng.random() < 0.6 else 0.0,
        noise_seed=int(rng.integers(2**31)),
    )


def _apart(centres: npt.NDArray[np.float64], radii: npt.NDArray[np.float64]) -> bool:
    for i in range(len(radii)):
        for j in range(i):
            delta = centres[i] - centres[j]
            if abs(delta[0]) < MIN_SEPARATION:
                return False
            if float(np.hypot(*delta)) < radii[i] + radii[j] + GAP:
                return False
    return True


def _draw_names(
    rng: np.random.Generator, names: tuple[str, ...], count: int, repeat: float
) -> list[str]:
    drawn: list[str] = []
    for _ in range(count):
        if drawn and rng.random() < repeat:
            drawn.append(drawn[int(rng.integers(len(drawn)))])
        else:
            drawn.append(names[int(rng.integers(len(names)))])
    return drawn


def draw(scene: Scene, width: int, height: int) -> Image.Image:
    """Return the scene as an RGB picture of ``width`` × ``height`` pixels."""
    return Image.fromarray(draw_array(scene, width, height))


def draw_array(scene: Scene, width: int, height: int) -> npt.NDArray[np.uint8]:
    """Return the scene as an array ``[height, width, 3]`` with antialiased edges."""
    pixels = np.full((height, width, 3), scene.grey, dtype=np.float32)
    if scene.noise:
        noise = np.random.default_rng(scene.noise_seed)
        grey_levels = noise.standard_normal((height, width, 1), dtype=np.float32)
        pixels += scene.noise * grey_levels
    for item in scene.objects:
        radius = item.radius * min(width, height)
        centre_x, centre_y = item.x * width, item.y * height
        reach = 1.15 * radius + 1
        left, right = max(0, int(centre_x - reach)), min(width, int(centre_x + reach) + 2)
        top, bottom = max(0, int(centre_y - reach)), min(height, int(centre_y + reach) + 2)
        x = (np.arange(left, right, dtype=np.float32) + 0.5 - centre_x) / radius
        y = (np.arange(top, bottom, dtype=np.float32) + 0.5 - centre_y) / radius
        distance = signed_distance(item.shape, x[None, :], y[:, None]) * radius
        coverage = np.clip(0.5 - distance, 0, 1)[..., None]
        area = pixels[top:bottom, left:right]
        area += coverage * (np.array(item.rgb, dtype=np.float32) - area)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def signed_distance(shape: str, x: FloatArray, y: FloatArray) -> FloatArray:
    """Return how far each point lies outside the shape, in radii; negative inside.

    ``x`` (rightwards) and ``y`` (downwards) are offsets from the centre in radii and broadcast
    against each other. The star is Inigo Quilez's ``sdStar5``.
    """
    if shape == "circle":
        return np.hypot(x, y) - 0.95
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.72) - 0.24
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.82
    if shape == "triangle":
        return np.maximum((2 * np.abs(x) - (y + 1.02)) / np.float32(np.sqrt(5)), y - 0.82)
    if shape == "cross":
        across, down = np.abs(x), np.abs(y)
        wide = np.maximum(across - 0.98, down - 0.31)
        return np.minimum(wide, np.maximum(across - 0.31, down - 0.98))
    if shape == "star":
        return _star_distance(x, y)
    raise ValueError(f"unknown shape: {shape}. Use one of {', '.join(SHAPES)}.")


def _star_distance(x: FloatArray, y: FloatArray) -> FloatArray:
    radius, inner = np.float32(1.1), np.float32(0.45)
    cos, sin = np.float32(0.809016994), np.float32(0.587785252)
    x, y = np.abs(x + 0 * y), -(y + 0 * x)
    fold = 2 * np.maximum(cos * x - sin * y, 0)
    x, y = x - fold * cos, y + fold * sin
    fold = 2 * np.maximum(-cos * x - sin * y, 0)
    x, y = np.abs(x + fold * cos), y + fold * sin - radius
    edge_x, edge_y = inner * sin, inner * cos - 1
    along = np.clip((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2), 0, radius)
    return np.hypot(x - edge_x * along, y - edge_y * along) * np.sign(y * edge_x - x * edge_y)


def caption(scene: Scene) -> str:
    """Return the objects from left to right, such as ``a small red circle and a large ...``."""
    phrases = [f"a {item.phrase}" for item in scene.objects]
    if len(phrases) == 1:
        return phrases[0]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def questions(scene: Scene, rng: np.random.Generator, varied: float = 0.0) -> list[QuestionAnswer]:
    """Return every kind of well-defined question about the scene as (question, answer, kind).

    An object is asked about by its shape or colour only where no other object shares it, and its
    place relative to another only where the order is clear. ``varied`` is the probability that a
    question comes in another wording than the usual one.
    """
    spelling = "color" if rng.random() < varied else "colour"
    items = scene.objects
    shapes, colours = [item.shape for item in items], [item.colour for item in items]
    asked: list[QuestionAnswer] = []
    for item in items:
        if shapes.count(item.shape) == 1:
            asked.append((f"What {spelling} is the {item.shape}?", item.colour, "colour"))
        if colours.count(item.colour) == 1:
            asked.append((f"What shape is the {item.colour} object?", item.shape, "shape"))
    asked.append(("How many objects are there?", str(len(items)), "count"))
    absent = [name for name in COLOURS if name not in colours]
    repeated = [name for name in dict.fromkeys(colours) if colours.count(name) > 1]
    for name in {*repeated, str(rng.choice(colours)), str(rng.choice(absent))}:
        question = f"How many {name} objects are there?"
        asked.append((question, str(colours.count(name)), "count_colour"))
    asked.sort()  # a set's order differs between processes
    asked.extend(_relations(scene, rng))
    wording = int(rng.integers(len(CAPTION_QUESTIONS))) if rng.random() < varied else 0
    asked.append((CAPTION_QUESTIONS[wording], caption(scene), "caption"))
    return asked


def _relations(scene: Scene, rng: np.random.Generator) -> list[QuestionAnswer]:
    shapes = [item.shape for item in scene.objects]
    unique = [item for item in scene.objects if shapes.count(item.shape) == 1]
    asked: list[QuestionAnswer] = []
    for i, first in enumerate(unique):
        for second in unique[:i]:
            for axis, words in (("x", ("left of", "right of")), ("y", ("above", "below"))):
                subject, other = (first, second) if rng.random() < 0.5 else (second, first)
                offset = getattr(subject, axis) - getattr(other, axis)
                if abs(offset) < MIN_SEPARATION:
                    continue
                word = int(rng.integers(2))
                answer = "yes" if (offset < 0) == (word == 0) else "no"
                question = f"Is the {subject.shape} {words[word]} the {other.shape}?"
                asked.append((question, answer, "relation"))
    return asked


def main() -> None:
    """Save one evaluation picture and print its questions."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out", help="where to save the picture")
    parser.add_argument("--seed", type=int, default=EVALUATION_SEEDS_FROM)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--height", type=int, default=384)
    args = parser.parse_args()
    rng = evaluation_rng(args.seed)
    scene = random_scene(rng)
    draw(scene, args.width, args.height).save(args.out)
    for question, answer, kind in questions(scene, rng):
        print(f"{kind}: {question} {answer}")


if __name__ == "__main__":
    main()
