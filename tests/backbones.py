"""Text backbones outside the native decoder's list, small, with what makes each one special."""

from __future__ import annotations

from typing import Any

from transformers import (
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    GraniteConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
)

WINDOW = 24  # shorter than the prompts, so that it matters
SLIDING, FULL = "sliding_attention", "full_attention"

#: Config class and what differs from the common sizes.
OTHER_BACKBONES: dict[str, tuple[Any, dict[str, Any]]] = {
    # Soft caps that scores and logits reach, a scale of its own, windows in every second layer.
    "gemma2": (
        Gemma2Config,
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 10,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 3.0,
            "sliding_window": WINDOW,
            "tie_word_embeddings": False,
        },
    ),
    # Norms of queries and keys.
    "qwen3": (Qwen3Config, {"head_dim": 24}),
    # Fused projections, half of each head rotated, a window in every layer.
    "phi3": (Phi3Config, {"partial_rotary_factor": 0.5, "sliding_window": WINDOW}),
    # Windows with rotary positions, then a layer without both; logits multiplied.
    "cohere2": (
        Cohere2Config,
        {
            "num_hidden_layers": 4,
            "layer_types": [SLIDING, FULL, SLIDING, FULL],
            "sliding_window": WINDOW,
            "logit_scale": 0.25,
            "tie_word_embeddings": True,
        },
    ),
    # Embeddings multiplied.
    "gemma": (GemmaConfig, {"head_dim": 24, "tie_word_embeddings": False}),
    # Two kinds of rotary positions.
    "gemma3": (
        Gemma3TextConfig,
        {
            "num_hidden_layers": 3,
            "layer_types": [SLIDING, SLIDING, FULL],
            "head_dim": 24,
            "query_pre_attn_scalar": 10,
            "sliding_window": WINDOW,
            "tie_word_embeddings": False,
        },
    ),
    # Norms after the blocks.
    "olmo2": (Olmo2Config, {}),
    # Attention beside the MLP, other names for its parts, biases.
    "neox": (GPTNeoXConfig, {}),
    # Layer norms, a quarter of each head rotated.
    "stablelm": (StableLmConfig, {"partial_rotary_factor": 0.25}),
    # Four multipliers, one of them on embeddings that are already merged.
    "granite": (
        GraniteConfig,
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
            "logits_scaling": 4.0,
        },
    ),
    # Layers without positions.
    "smollm3": (
        SmolLM3Config,
        {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0], "tie_word_embeddings": False},
    ),
    # Experts, kept apart in checkpoints and together in memory, by two namings.
    "qwen3moe": (
        Qwen3MoeConfig,
        {"head_dim": 24, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def other_config(backbone: str, common: dict[str, Any], changes: dict[str, Any]) -> Any:
    """The backbone's config: sizes in common with others, what is special, a test's changes."""
    config_class, special = OTHER_BACKBONES[backbone]
    return config_class(**{**common, **special, **changes})
