"""The text backbone of a LLaVA checkpoint as a GGUF, without torch: numpy and gguf only."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

NAMES = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def write_gguf(checkpoint: Path, out: Path, dtype: str) -> None:
    """Write `out` from the checkpoint's folder; its one safetensors file holds bfloat16.

    Matrices are written in `dtype` (bfloat16 or float32), norms in float32, as llama.cpp's own
    conversion does. There is no vocabulary: prompts and answers are token ids.
    """
    import gguf

    whole = json.loads((checkpoint / "config.json").read_text("utf-8"))
    config = whole["text_config"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("none")
    types = gguf.GGMLQuantizationType
    matrix = types.F32 if dtype == "float32" else types.BF16
    for name, array in tensors(checkpoint / "model.safetensors"):
        named = gguf_name(name)
        if named is None:
            continue
        if named.endswith(("attn_q.weight", "attn_k.weight")):
            array = permuted(array, heads if "attn_q" in named else kv_heads)
        kind = matrix if array.ndim > 1 else types.F32
        writer.add_tensor(named, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str | None:
    """What llama.cpp calls a tensor; None for those outside the text backbone."""
    found = re.search(r"(?:layers\.(\d+)\.)?((?:self_attn\.|mlp\.)?\w+\.weight)$", name)
    if "vision" in name or "projector" in name or found is None:
        return None
    layer, rest = found.groups()
    return NAMES[rest] if layer is None else f"blk.{layer}.{NAMES[rest]}"


def permuted(array: Any, num_heads: int) -> Any:
    """Rows of queries and keys in llama.cpp's order: halves of a head that are rotated against
    each other lie in pairs."""
    rows, columns = array.shape
    halves = array.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


def tensors(path: Path) -> Any:
    """Name and float32 array of each tensor of a safetensors file of bfloat16 or float32."""
    import numpy as np

    with path.open("rb") as file:
        head_size = int.from_bytes(file.read(8), "little")
        head = json.loads(file.read(head_size))
        for name, about in head.items():
            if name == "__metadata__":
                continue
            begin, end = about["data_offsets"]
            file.seek(8 + head_size + begin)
            data = file.read(end - begin)
            if about["dtype"] == "BF16":
                wide = np.frombuffer(data, np.uint16).astype(np.uint32) << 16
                array = wide.view(np.float32)
            else:
                array = np.frombuffer(data, {"F32": np.float32, "F16": np.float16}[about["dtype"]])
            yield name, array.reshape(about["shape"]).astype(np.float32)
