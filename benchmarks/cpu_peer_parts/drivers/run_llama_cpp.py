"""llama.cpp through llama-cpp-python's bindings, on the text backbone as a GGUF."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from protocol import Events, serve, versions

BATCH = 2048  # tokens handed over at once, llama.cpp's default
FILE_TYPES = {"q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0"}
loaded: dict[str, Any] = {}


def prepare(model: str, folder: str, dtype: str, quantization: str | None = None) -> dict[str, Any]:
    """Write the GGUF unless it is there; llama.cpp's own function quantises it."""
    from gguf_file import write_gguf

    plain = Path(folder) / f"text-{dtype}.gguf"
    if not plain.is_file():
        new = plain.with_suffix(".new")
        write_gguf(Path(model), new, dtype)
        new.replace(plain)
    if quantization is None:
        return {"path": str(plain)}
    import llama_cpp as api

    quantized = Path(folder) / f"text-{quantization}.gguf"
    if not quantized.is_file():
        params = api.llama_model_quantize_default_params()
        params.ftype = getattr(api, FILE_TYPES[quantization])
        params.nthread = 0  # as many as there are cores
        params.allow_requantize = True  # of 16 bits, which it counts among the quantised types
        new = quantized.with_suffix(".new")
        code = api.llama_model_quantize(os.fsencode(plain), os.fsencode(new), params)
        if code:
            raise RuntimeError(f"llama_model_quantize returned {code}")
        new.replace(quantized)
    return {"path": str(quantized)}


def load(
    model: str, dtype: str, threads: int, max_model_len: int, max_num_seqs: int, kv_bytes: int
) -> dict[str, Any]:
    """Load a GGUF; its KV cache has 16 bits a number, as llama.cpp has it by default."""
    import llama_cpp as api

    api.llama_backend_init()
    opened = api.llama_model_load_from_file(os.fsencode(model), api.llama_model_default_params())
    if not opened:
        raise RuntimeError(f"llama.cpp can't load {model}")
    heads, kv_heads = api.llama_model_n_head(opened), api.llama_model_n_head_kv(opened)
    width = api.llama_model_n_embd(opened) // heads * kv_heads
    token_bytes = 2 * api.llama_model_n_layer(opened) * width * 2
    item = 4 if dtype == "float32" else 2  # of the others' caches, for as many tokens
    params = api.llama_context_default_params()
    params.n_ctx = -(-kv_bytes // (token_bytes * item // 2)) // 256 * 256
    params.n_batch = BATCH
    params.n_seq_max = max_num_seqs
    params.kv_unified = True  # one cache for all sequences, of any lengths
    params.n_threads = params.n_threads_batch = threads
    context = api.llama_init_from_model(opened, params)
    if not context:
        raise RuntimeError("llama.cpp can't make a context")
    loaded["context"] = context
    loaded["num_tokens"] = api.llama_vocab_n_tokens(api.llama_model_get_vocab(opened))
    loaded["batch"] = api.llama_batch_init(BATCH, 0, 1)
    names = ("llama-cpp-python", "gguf", "numpy")
    return {"versions": versions(*names), "kv_bytes": params.n_ctx * token_bytes}


def answer(
    prompts: list[list[int]], num_tokens: int, images: list[int], image_size: int
) -> dict[str, Any]:
    """`num_tokens` for each prompt, greedily: all prompts first, then all sequences together."""
    if images:
        raise RuntimeError("this GGUF has no vision tower")
    events, count = Events(), len(prompts)
    newest = [int(row.argmax()) for row in read(prompts)]
    firsts = list(newest)
    events.tell(count, count, count * (num_tokens == 1))
    for i in range(num_tokens - 1):
        step = [(newest[k], len(prompts[k]) + i, k, True) for k in range(count)]
        for number, row in decode(step).items():
            newest[number] = int(row.argmax())
        events.tell(0, count, count * (i == num_tokens - 2))
    return events.answer(firsts)


def logits(prompts: list[list[int]], path: str) -> dict[str, Any]:
    """Write the logits that follow each prompt, `[prompts, vocabulary]`, as numpy does."""
    import numpy as np

    np.save(path, np.stack(read(prompts)))
    return {}


def read(prompts: list[list[int]]) -> list[Any]:
    """Forget all sequences and begin new ones; the logits that follow each prompt."""
    import llama_cpp as api

    api.llama_memory_clear(api.llama_get_memory(loaded["context"]), False)
    rows = [
        (token, place, number, place == len(ids) - 1)
        for number, ids in enumerate(prompts)
        for place, token in enumerate(ids)
    ]
    newest: list[Any] = [None] * len(prompts)
    for i in range(0, len(rows), BATCH):
        for number, row in decode(rows[i : i + BATCH]).items():
            newest[number] = row.copy()  # the next call writes over it
    return newest


def decode(rows: list[tuple[int, int, int, bool]]) -> dict[int, Any]:
    """The logits after each row that asks for them, by sequence, until the next call.

    A row is (token, place, sequence, whether it asks).
    """
    import llama_cpp as api
    import numpy as np

    batch = loaded["batch"]
    batch.n_tokens = len(rows)
    for i, (token, place, number, asks) in enumerate(rows):
        batch.token[i], batch.pos[i] = token, place
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, number
        batch.logits[i] = asks
    code = api.llama_decode(loaded["context"], batch)
    if code:
        raise RuntimeError(f"llama_decode returned {code}")
    found = {}
    for i, (_, _, number, asks) in enumerate(rows):
        if asks:
            logits = api.llama_get_logits_ith(loaded["context"], i)
            shape = (loaded["num_tokens"],)
            found[number] = np.ctypeslib.as_array(logits, shape)
    return found


if __name__ == "__main__":
    serve({"prepare": prepare, "load": load, "answer": answer, "logits": logits})
