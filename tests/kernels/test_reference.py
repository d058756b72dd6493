"""The plain kernels mean what transformers' modules compute."""

from __future__ import annotations

import pytest
import torch
from mm_engine_kernels import reference
from transformers import LlamaConfig, MistralConfig
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral

SIZES = [24, 60, 63, 64, 128]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm_is_transformers(size: int, dtype: torch.dtype) -> None:
    module = modeling_llama.LlamaRMSNorm(size, eps=1e-5)
    module.weight.data = noise(size, seed=1)
    module, x = module.to(dtype), (noise(7, size) * 3).to(dtype)
    with torch.no_grad():
        assert torch.equal(reference.rms_norm(x, module.weight, 1e-5), module(x))


def test_add_rms_norm_is_the_norm_of_the_sum_and_the_sum() -> None:
    x, residual, weight = noise(5, 64), noise(5, 64, seed=1), noise(64, seed=2)
    normed, total = reference.add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, reference.rms_norm(x + residual, weight, 1e-6))


@pytest.mark.parametrize("dim", [size for size in SIZES if size % 2 == 0])
def test_rotary_is_transformers(dim: int) -> None:
    config = LlamaConfig(hidden_size=4 * dim, num_attention_heads=4, num_key_value_heads=2)
    positions = torch.tensor([0, 1, 5, 1000, 3])
    query, key = noise(5, 4, dim), noise(5, 2, dim, seed=1)
    cos, sin = modeling_llama.LlamaRotaryEmbedding(config)(query, positions[None])
    batched = (t.transpose(0, 1)[None] for t in (query, key))  # [1, heads, T, D]
    expected = modeling_llama.apply_rotary_pos_emb(*batched, cos, sin)
    for tensor, rotated in zip((query, key), expected, strict=True):
        got = reference.rotary(tensor, cos[0], sin[0])
        torch.testing.assert_close(got, rotated[0].transpose(0, 1), rtol=0, atol=1e-6)


def test_silu_mul_is_transformers_gate() -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=63, num_attention_heads=2)
    mlp = modeling_llama.LlamaMLP(config)
    x = noise(5, 16)
    with torch.no_grad():
        gate_up = torch.cat((mlp.gate_proj(x), mlp.up_proj(x)), dim=-1)
        expected = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        torch.testing.assert_close(reference.silu_mul(gate_up), expected)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_linear_is_torchs(bias: bool) -> None:
    layer = torch.nn.Linear(60, 63, bias=bias)
    x = noise(7, 60)
    with torch.no_grad():
        assert torch.equal(reference.linear(x, layer.weight, layer.bias), layer(x))


@pytest.mark.parametrize("window", [None, 4], ids=["full", "window4"])
@pytest.mark.parametrize("num_new", [1, 5, 11], ids=lambda n: f"new{n}")
@pytest.mark.parametrize("dim", SIZES)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (7, 1)], ids=lambda h: f"{h[0]}x{h[1]}")
def test_paged_attention_is_transformers_eager_attention(
    heads: tuple[int, int], dim: int, num_new: int, window: int | None
) -> None:
    num_heads, num_kv_heads = heads
    length, block_size = 11, 4
    key, value = noise(length, num_kv_heads, dim), noise(length, num_kv_heads, dim, seed=1)
    query, blocks = noise(num_new, num_heads, dim, seed=2), torch.tensor([[5, 0, 3]])
    caches = (torch.full((6, block_size, num_kv_heads, dim), 1e4) for _ in range(2))
    key_cache, value_cache = caches
    slots = (blocks[0][:, None] * block_size + torch.arange(block_size)).flatten()[:length]
    reference.write_kv(key, value, key_cache, value_cache, slots)
    got = reference.paged_attention(
        query, key_cache, value_cache, blocks, [num_new], [length], dim**-0.5, window
    )

    # The mask doesn't depend on the head size, and the config must have an even one.
    config = MistralConfig(
        hidden_size=8, num_attention_heads=1, sliding_window=window, attn_implementation="eager"
    )
    make_mask = (
        modeling_mistral.create_sliding_window_causal_mask
        if window
        else modeling_mistral.create_causal_mask
    )
    mask = make_mask(
        config=config,
        inputs_embeds=noise(1, length, 8),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.arange(length)[None],
    )
    module = torch.nn.Module()
    module.num_key_value_groups = num_heads // num_kv_heads
    expected, _ = modeling_mistral.eager_attention_forward(
        module,
        query.transpose(0, 1)[None],
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        mask[:, :, -num_new:],
        scaling=dim**-0.5,
    )
    torch.testing.assert_close(got, expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_a_soft_cap_is_transformers(softcap: float) -> None:
    length, dim = 9, 24
    query, key, value = noise(length, 4, dim), noise(length, 2, dim, seed=1), noise(length, 2, dim)
    got = reference.paged_attention(
        query, key[None], value[None], torch.tensor([[0]]), [9], [9], 0.4, softcap=softcap
    )
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    batched = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    expected, _ = modeling_gemma2.eager_attention_forward(
        module, *batched, mask, scaling=0.4, softcap=softcap
    )
    torch.testing.assert_close(got, expected[0], rtol=1e-5, atol=1e-5)


def test_write_kv_writes_its_slots_only() -> None:
    key, value = noise(3, 2, 8), noise(3, 2, 8, seed=1)
    key_cache, value_cache = torch.zeros(4, 5, 2, 8), torch.zeros(4, 5, 2, 8)
    reference.write_kv(key, value, key_cache, value_cache, torch.tensor([19, 0, 7]))
    assert torch.equal(key_cache[3, 4], key[0])
    assert torch.equal(key_cache[0, 0], key[1])
    assert torch.equal(value_cache[1, 2], value[2])
    assert key_cache.any(-1).any(-1).sum() == 3


def test_sequences_of_a_step_do_not_see_each_other() -> None:
    """One call over three sequences is three calls over one."""
    keys, values = noise(6, 4, 2, 8), noise(6, 4, 2, 8, seed=1)
    query = noise(1 + 4 + 2, 4, 8, seed=2)
    tables, new, lens = torch.tensor([[0, 1], [2, 2], [5, 3]]), [1, 4, 2], [7, 4, 8]
    together = reference.paged_attention(query, keys, values, tables, new, lens, 0.3)
    alone = [
        reference.paged_attention(rows, keys, values, tables[i : i + 1], [new[i]], [lens[i]], 0.3)
        for i, rows in enumerate(query.split(new))
    ]
    assert torch.equal(together, torch.cat(alone))


def test_merge_puts_rows_at_their_positions_in_the_embeddings_dtype() -> None:
    embeddings = torch.zeros(5, 8, dtype=torch.bfloat16)
    rows = noise(2, 8)
    merged = reference.merge_by_position(embeddings, rows, torch.tensor([4, 1]))
    assert torch.equal(merged[4], rows[0].bfloat16())
    assert torch.equal(merged[1], rows[1].bfloat16())
    assert not merged[[0, 2, 3]].any()
