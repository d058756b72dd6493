"""This engine, offline, as `LLM` has it by default but for the prefix cache.

It is imported as `engine generate` and the server do it, without the parts of torch that only
compiling needs.
"""

from __future__ import annotations

from typing import Any

from protocol import Events, picture, serve, versions

loaded: dict[str, Any] = {}


def load(
    model: str,
    dtype: str,
    threads: int,
    max_model_len: int,
    max_num_seqs: int,
    kv_bytes: int,
    quantization: str | None = None,
) -> dict[str, Any]:
    """Import, load, be ready to answer."""
    from mm_engine.light_imports import import_transformers

    import_transformers()
    import torch

    from mm_engine import LLM

    torch.set_num_threads(threads)
    options = {} if quantization is None else {"quantization": quantization}
    llm = LLM(
        model,
        dtype=dtype,
        device="cpu",
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        kv_cache_memory=kv_bytes,
        enable_prefix_caching=False,  # every round asks the same
        progress=False,
        **options,
    )
    loaded["llm"] = llm
    names = ("mm-engine", "mm-engine-kernels", "torch", "transformers")
    return {"versions": versions(*names), "kv_bytes": kv_bytes}


def answer(
    prompts: list[list[int]], num_tokens: int, images: list[int], image_size: int
) -> dict[str, Any]:
    """`num_tokens` for each prompt, greedily; image i is for prompt i."""
    from mm_engine import SamplingParams

    llm = loaded["llm"]
    asked: list[dict[str, Any]] = [{"prompt_token_ids": ids} for ids in prompts]
    for prompt, seed in zip(asked, images, strict=False):
        prompt["multi_modal_data"] = {"image": [picture(seed, image_size)]}
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    step, seen, events = llm.engine.step, set[str](), Events()

    def timed() -> list[Any]:
        outputs: list[Any] = step()
        new = {output.request_id: output for output in outputs if output.outputs}
        if new:
            began = len(new.keys() - seen)
            seen.update(new)
            num_new = sum(len(output.outputs[0].token_ids) for output in new.values())
            events.tell(began, num_new, sum(output.finished for output in outputs))
        return outputs

    llm.engine.step = timed
    try:
        outputs = llm.generate(asked, params, use_tqdm=False)
    finally:
        del llm.engine.step
    for output in outputs:
        if output.error is not None:
            raise RuntimeError(output.error.message)
    return events.answer([output.outputs[0].token_ids[0] for output in outputs])


def logits(prompts: list[list[int]], path: str) -> dict[str, Any]:
    """Write the logits that follow each prompt, `[prompts, vocabulary]`, as numpy does."""
    import numpy as np

    from mm_engine import SamplingParams

    llm, rows = loaded["llm"], dict[int, Any]()
    sampler = llm.engine.runner._runner.sampler
    launch = sampler.launch

    def watched(logits: Any, sequences: Any) -> Any:
        for row, sequence in zip(logits, sequences, strict=True):
            rows[sequence.request.sampling_params.seed] = row.float().numpy().copy()
        return launch(logits, sequences)

    # The seed, which greedy answers don't need, says whose logits they are.
    params = [SamplingParams(temperature=0.0, max_tokens=1, seed=i) for i in range(len(prompts))]
    sampler.launch = watched
    try:
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    finally:
        sampler.launch = launch
    np.save(path, np.stack([rows[i] for i in range(len(prompts))]))
    return {}


if __name__ == "__main__":
    serve({"load": load, "answer": answer, "logits": logits})
