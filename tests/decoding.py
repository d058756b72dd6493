"""Running a text backbone by itself over a paged cache, and what transformers makes of the same."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from mm_engine.attention.backend import Attention
from mm_engine.attention.metadata import AttentionMetadata
from mm_engine.attention.torch_sdpa import TorchAttention
from mm_engine.config import ModelContext
from mm_engine.models import TransformersDecoder
from mm_engine.models.weights import weight_targets

BLOCK_SIZE = 4


def make_context(text: Any, max_model_len: int = 64) -> ModelContext:
    """The context of a model that is this text backbone and nothing else."""
    tokenizer: Any = None  # a decoder asks for none
    return ModelContext(text, Path(), tokenizer, torch.float32, max_model_len, {}, "Any")


def make_decoder(config: Any, max_model_len: int = 64) -> TransformersDecoder:
    """A decoder with random weights, norms included, so that nothing cancels out."""
    torch.manual_seed(0)
    decoder = TransformersDecoder(config, make_context(config, max_model_len))
    generator = torch.Generator().manual_seed(0)
    for parameter in decoder.parameters():
        mean = 0.0 if parameter.dim() > 1 else 0.3
        parameter.data.normal_(mean, 0.12, generator=generator)
    return decoder


def layers_of(decoder: TransformersDecoder) -> list[Attention]:
    """Its attention layers, in order."""
    return [module for module in decoder.modules() if isinstance(module, Attention)]


def run_paged(decoder: TransformersDecoder, ids: Tensor, chunks: Sequence[int]) -> Tensor:
    """Logits `[T, vocab]` of `ids` `[T]`, computed in chunks of these lengths."""
    layers = layers_of(decoder)
    num_blocks = -(-len(ids) // BLOCK_SIZE)
    shapes = [(num_blocks, BLOCK_SIZE, layer.num_kv_heads, layer.head_dim) for layer in layers]
    caches = [(torch.zeros(shape), torch.zeros(shape)) for shape in shapes]
    for index, layer in enumerate(layers):
        layer.layer_index = index
    logits, start = [], 0
    with torch.inference_mode():
        for num in chunks:
            places = torch.arange(start, start + num)
            blocks = torch.arange(num_blocks, dtype=torch.int32)[None]
            metadata = AttentionMetadata.of_lens(
                TorchAttention(), caches, places, blocks, [num], [start + num]
            )
            embeddings = decoder.embed_tokens(ids[places])
            hidden = decoder(ids[places], places, metadata, inputs_embeds=embeddings)
            logits.append(decoder.compute_logits(hidden))
            start += num
    assert start == len(ids)
    return torch.cat(logits)


def transformers_logits(decoder: TransformersDecoder, config: Any, ids: Tensor) -> Tensor:
    """Logits `[T, vocab]` of transformers' causal model with the decoder's weights."""
    model: Any = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation="eager", dtype=torch.float32
    ).eval()
    missing = model.load_state_dict(decoder.causal.state_dict(), strict=False).missing_keys
    assert missing == ([] if decoder.lm_head is not None else [f"{decoder.head_path}.weight"])
    if decoder.lm_head is None:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0]
    return logits


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint may name of `model`, by name."""
    return {name: target.tensor for name, target in weight_targets(model).items()}
