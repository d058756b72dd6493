"""`LLM.generate` in a process of its own: `python offline.py '{"model": …, "options": {…}}'`.

Each line of its input is a JSON object with prompts (lists of token ids) and how many tokens each
answer has. For each it prints one: the seconds that the answers took, the processor time of all
its threads meanwhile, and how many tokens there were. It ends with its input.
"""

from __future__ import annotations

import json
import sys
import time

from mm_engine import LLM, SamplingParams


def main() -> None:
    """Answer until there is no more to answer."""
    asked = json.loads(sys.argv[1])
    llm = LLM(asked["model"], progress=False, **asked["options"])
    for line in sys.stdin:
        asked = json.loads(line)
        params = SamplingParams(
            temperature=0.0,
            max_tokens=asked["output_len"],
            ignore_eos=True,
            skip_special_tokens=False,
        )
        prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
        begin, cpu = time.perf_counter(), time.process_time()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        measured = {
            "seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - cpu,
            "output_tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
        }
        print(json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
