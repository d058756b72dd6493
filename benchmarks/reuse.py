"""What a second question about a picture costs, beside the first: one process, turn by turn.

    python benchmarks/reuse.py [--json out.json]

The floor: of a prompt of 576 image tokens and some text, the second question computes its own text
and what is left of a block, some 30 tokens in place of 617, and no vision tower.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from checkpoint import IMAGE_TOKEN, make_checkpoint
from mm_engine import LLM, SamplingParams
from record import begin, write

NUM_TEXT = 40  # tokens of a question
FIRST_TOKEN = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)


def seconds_of(llm: LLM, picture: Image.Image, seed: int) -> tuple[float, int]:
    """Time to the first token of a question about `picture`, and tokens that were found."""
    question = np.random.default_rng(seed).integers(10, 210, NUM_TEXT).tolist()
    prompt: Any = {
        "prompt_token_ids": [1, IMAGE_TOKEN, *question],
        "multi_modal_data": {"image": picture},
    }
    start = time.perf_counter()
    (output,) = llm.generate(prompt, FIRST_TOKEN, use_tqdm=False)
    return time.perf_counter() - start, output.num_cached_tokens


def main() -> None:
    """Measure, print, write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path(".cache/benchmark-0.5b"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    head = begin("reuse", args.json)
    llm = LLM(str(make_checkpoint(args.checkpoint)), dtype=args.dtype, kv_cache_memory=1 << 29)
    rng = np.random.default_rng(0)
    first, second, found = [], [], []
    for turn in range(args.rounds + 1):  # one to warm up
        picture = Image.fromarray(rng.integers(0, 256, (336, 336, 3), dtype=np.uint8))
        one, _ = seconds_of(llm, picture, 2 * turn)
        encoded = llm.engine.stats().num_encodes
        two, num_found = seconds_of(llm, picture, 2 * turn + 1)
        assert llm.engine.stats().num_encodes == encoded, "the tower ran"
        if turn:
            first.append(one)
            second.append(two)
            found.append(num_found)
    figures = [statistics.median(values) for values in (first, second)]
    record = {
        **head,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "first_question_seconds": figures[0],
        "second_question_seconds": figures[1],
        "ratio": figures[1] / figures[0],
        "cached_tokens": statistics.median(found),
    }
    print(json.dumps(record, indent=2))
    write(record, args.json)


if __name__ == "__main__":
    main()
