"""This engine beside transformers' `generate`: one checkpoint, one process, turn by turn.

    python benchmarks/compare.py [--dtype float32] [--json out.json]

Each figure is the median of several rounds in which the two take turns, so that what else the
machine does falls on both alike. Ratios are the result; the absolute figures name the machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from checkpoint import IMAGE_TOKEN, make_checkpoint
from mm_engine import LLM, SamplingParams
from record import begin, write
from table import comparison

IMAGE_TEXT, SHORT_TEXT = 41, 32  # text tokens beside the image
NUM_DECODED = 24
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class Row:
    """One figure of both engines; `higher` says which way is better."""

    name: str
    unit: str
    ours: float
    theirs: float
    higher: bool

    @property
    def ratio(self) -> float:
        """How many times better this engine is."""
        return self.ours / self.theirs if self.higher else self.theirs / self.ours


class Ours:
    """This engine, offline."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.llm = LLM(
            str(path),
            dtype=dtype,
            max_num_seqs=32,
            kv_cache_memory=1 << 30,
            enable_prefix_caching=False,  # every round asks the same; the peer computes it anew
            progress=False,
        )

    def seconds(
        self, ids: list[int], images: list[Image.Image], count: int, num_tokens: int
    ) -> float:
        """Answer `count` requests of `num_tokens` each; wall time in seconds."""
        prompts: list[Any] = [
            {"prompt_token_ids": ids, "multi_modal_data": {"image": images[i : i + 1]}}
            for i in range(count)
        ]
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        start = time.perf_counter()
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        elapsed = time.perf_counter() - start
        assert all(len(output.outputs[0].token_ids) == num_tokens for output in outputs)
        return elapsed


class Theirs:
    """transformers' `generate` on a static batch."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.dtype = getattr(torch, dtype)
        self.model: Any = transformers.LlavaForConditionalGeneration.from_pretrained(
            path, dtype=self.dtype
        ).eval()
        self.processor = AutoImageProcessor.from_pretrained(path)
        self.image_token = self.model.config.image_token_id

    def seconds(
        self, ids: list[int], images: list[Image.Image], count: int, num_tokens: int
    ) -> float:
        """Answer `count` requests of `num_tokens` each in one batch; wall time in seconds."""
        start = time.perf_counter()
        expanded = [t for i in ids for t in ([i] * 576 if i == self.image_token else [i])]
        batch = torch.tensor([expanded] * count)
        pixels = {}
        if images:
            pixels["pixel_values"] = self.processor(images[:count], return_tensors="pt")[
                "pixel_values"
            ].to(self.dtype)
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=None,
                **pixels,
            )
        assert out.shape[1] == len(expanded) + num_tokens
        return time.perf_counter() - start


def text_ids(num_tokens: int) -> list[int]:
    """BOS and arbitrary byte tokens."""
    return [1, *(10 + i * 7 % 200 for i in range(num_tokens - 1))]


def measure(rounds: int, tick: Callable[[], None], *engines: Callable[[], float]) -> list[float]:
    """Median of each engine's figure over `rounds` rounds in turns, after one to warm up."""
    figures: list[list[float]] = [[] for _ in engines]
    for round_ in range(rounds + 1):
        for engine, taken in zip(engines, figures, strict=True):
            figure = engine()
            if round_:
                taken.append(figure)
        tick()
    return [statistics.median(taken) for taken in figures]


def decode_rate(engine: Ours | Theirs, ids: list[int], count: int) -> float:
    """Tokens per second over all sequences, prefill taken out."""
    first = engine.seconds(ids, [], count, 1)
    return count * (NUM_DECODED - 1) / (engine.seconds(ids, [], count, NUM_DECODED) - first)


def run(path: Path, rounds: int, dtype: str) -> list[Row]:
    """All figures, of weights, features and cache in `dtype`."""
    rng = np.random.default_rng(0)

    def fresh(count: int) -> list[Image.Image]:
        """Pictures never seen before: features of known ones are kept, and would cost nothing."""
        pixels = rng.integers(0, 256, (count, 336, 336, 3), dtype=np.uint8)
        return [Image.fromarray(picture) for picture in pixels]

    image_ids = [1, IMAGE_TOKEN, *text_ids(IMAGE_TEXT)[1:]]
    short_ids = [1, IMAGE_TOKEN, *text_ids(SHORT_TEXT)[1:]]
    ours, theirs = Ours(path, dtype), Theirs(path, dtype)
    rows: list[Row] = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Measuring", total=5 * (rounds + 1))

        def tick() -> None:
            bar.advance(task)

        a, b = measure(
            rounds,
            tick,
            lambda: ours.seconds(image_ids, fresh(1), 1, 1),
            lambda: theirs.seconds(image_ids, fresh(1), 1, 1),
        )
        rows.append(Row("time to first token, 1 image, 617 tokens", "s", a, b, higher=False))
        for count in (1, 8, 32):
            prompt = text_ids(128)
            a, b = measure(
                rounds,
                tick,
                lambda prompt=prompt, count=count: decode_rate(ours, prompt, count),
                lambda prompt=prompt, count=count: decode_rate(theirs, prompt, count),
            )
            plural = "s" * (count > 1)
            name = f"decode, {count} sequence{plural}, 128-token prompt{plural}"
            rows.append(Row(name, "tokens/s", a, b, higher=True))
        a, b = measure(
            max(1, rounds // 2),
            tick,
            lambda: ours.seconds(short_ids, fresh(16), 16, 64),
            lambda: theirs.seconds(short_ids, fresh(16), 16, 64),
        )
        rows.append(Row("16 × (image + 32 → 64 tokens), end to end", "s", a, b, higher=False))
    return rows


def main() -> None:
    """Measure, print a Markdown table, write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path(".cache/benchmark-0.5b"))
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    head = begin("compare", args.json)
    rows = run(make_checkpoint(args.checkpoint), args.rounds, args.dtype)
    record = {
        **head,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "rows": [
            {
                **{k: getattr(row, k) for k in ("name", "unit", "ours", "theirs")},
                "ratio": row.ratio,
            }
            for row in rows
        ],
    }
    print(comparison(record))
    write(record, args.json)


if __name__ == "__main__":
    main()
