"""Ask a checkpoint questions about pictures that it never saw and count the exact answers."""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from batches import SIDE
from pictures import (
    EVALUATION_SEEDS_FROM,
    KINDS,
    QuestionAnswer,
    draw,
    evaluation_rng,
    questions,
    random_scene,
)
from views import random_size

MAX_NEW_TOKENS = 40
ASPECTS = ((1.0, 1.25), (1.25, 1.75), (1.75, 2.25), (2.25, 3.1))
"""Ranges of the longer side over the shorter one that are reported apart, the upper excluded."""


@dataclass(frozen=True)
class Outcome:
    """One question about one picture, with the answer given."""

    seed: int
    question: str
    expected: str
    given: str
    kind: str
    size: tuple[int, int]
    """Width and height that the picture was drawn at."""

    @property
    def aspect(self) -> float:
        """The picture's longer side over the shorter one."""
        return max(self.size) / min(self.size)


def evaluate(
    checkpoint: Path,
    *,
    num_questions: int,
    dtype: torch.dtype,
    side: int | None = None,
    varied: float = 0.0,
    first_seed: int = EVALUATION_SEEDS_FROM,
    batch_size: int = 64,
) -> list[Outcome]:
    """Return the greedy answers to two questions about each picture, of random kinds.

    ``side`` draws square pictures of that many pixels a side. Without it they have the model's own
    ``SIDE``, or each a size and aspect of its own where the image processor makes tiles.
    ``varied`` is the share of questions in other than the usual wording.
    """
    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype).eval()
    if side is None and not hasattr(processor.image_processor, "image_grid_pinpoints"):
        side = SIDE
    outcomes: list[Outcome] = []
    seed = first_seed
    with tqdm(total=num_questions, desc=str(dtype), mininterval=5) as bar:
        while len(outcomes) < num_questions:
            asked: list[tuple[int, Image.Image, QuestionAnswer]] = []
            while len(asked) < min(batch_size, num_questions - len(outcomes)):
                picture, chosen = _picture_and_questions(seed, side, varied)
                asked.extend((seed, picture, question) for question in chosen)
                seed += 1
            conversations = [
                [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": picture},
                            {"type": "text", "text": question},
                        ],
                    }
                ]
                for _, picture, (question, _, _) in asked
            ]
            inputs = processor.apply_chat_template(
                conversations,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                processor_kwargs={"return_tensors": "pt", "padding": True},
            ).to(dtype)
            generated = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[
                :, inputs["input_ids"].shape[1] :
            ]
            texts = processor.batch_decode(generated, skip_special_tokens=True)
            for (source, picture, (question, answer, kind)), text in zip(asked, texts, strict=True):
                given = text.strip()
                outcomes.append(Outcome(source, question, answer, given, kind, picture.size))
            bar.update(len(asked))
    return outcomes


def _picture_and_questions(
    seed: int, side: int | None, varied: float
) -> tuple[Image.Image, list[QuestionAnswer]]:
    """Return the seed's picture and a question of each of two kinds drawn at random."""
    rng = evaluation_rng(seed)
    size = (side, side) if side is not None else random_size(rng.spawn(1)[0])
    scene = random_scene(rng)
    by_kind: dict[str, list[QuestionAnswer]] = defaultdict(list)
    for question in questions(scene, rng, varied):
        by_kind[question[2]].append(question)
    kinds = [kind for kind in KINDS if kind in by_kind]
    chosen = [kinds[int(i)] for i in rng.choice(len(kinds), 2, replace=False)]
    picked = [by_kind[kind][int(rng.integers(len(by_kind[kind])))] for kind in chosen]
    return draw(scene, *size), picked


def report(outcomes: list[Outcome]) -> str:
    """Return a Markdown table of the exact answers by kind of question, and by aspect if varied."""
    groups = {kind: [o for o in outcomes if o.kind == kind] for kind in KINDS}
    groups["all"] = outcomes
    if any(outcome.aspect > 1 for outcome in outcomes):
        for low, high in ASPECTS:
            name = f"aspect {low} to {high}"
            groups[name] = [o for o in outcomes if low <= o.aspect < high]
    lines = ["| kind | questions | exact |", "|---|---|---|"]
    for name, chosen in groups.items():
        exact = sum(outcome.given == outcome.expected for outcome in chosen)
        lines.append(f"| {name} | {len(chosen)} | {exact / max(1, len(chosen)):.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Evaluate a checkpoint and print the accuracy by kind of question."""
    parser = argparse.ArgumentParser(
        description=main.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--side", type=int, help="draw squares of so many pixels a side")
    parser.add_argument("--batch-size", type=int, default=64, help="questions answered together")
    parser.add_argument("--first-seed", type=int, default=EVALUATION_SEEDS_FROM)
    parser.add_argument("--varied", type=float, default=0.0, help="share of other wordings")
    parser.add_argument("--wrong", type=int, default=0, help="how many wrong answers to print")
    args = parser.parse_args()
    outcomes = evaluate(
        args.checkpoint,
        num_questions=args.questions,
        dtype=getattr(torch, args.dtype),
        side=args.side,
        varied=args.varied,
        first_seed=args.first_seed,
        batch_size=args.batch_size,
    )
    print(report(outcomes))
    wrong = [outcome for outcome in outcomes if outcome.given != outcome.expected]
    for outcome in wrong[: args.wrong]:
        print(outcome)


if __name__ == "__main__":
    main()
