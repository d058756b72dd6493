"""`LLM.generate` in a process of its own: `python offline.py`, with a JSON object as its input.

Prints, as JSON, the seconds that each round took and the processor time of all its threads.
"""

from __future__ import annotations

import json
import sys
import time

from mm_engine import LLM, SamplingParams


def main() -> None:
    """Answer all prompts in each round, after a first that isn't counted."""
    asked = json.load(sys.stdin)
    llm = LLM(asked["model"], progress=False, **asked["options"])
    params = SamplingParams(
        temperature=0.0,
        max_tokens=asked["output_len"],
        ignore_eos=True,
        skip_special_tokens=False,
    )
    rounds = []
    for prompts in asked["rounds"]:
        begin, cpu = time.perf_counter(), time.process_time()
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False
        )
        seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
        num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        rounds.append({"seconds": seconds, "cpu_seconds": cpu, "output_tokens": num_tokens})
    print(json.dumps(rounds[1:]))


if __name__ == "__main__":
    main()
