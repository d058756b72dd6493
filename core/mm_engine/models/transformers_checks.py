"""What of transformers' text backbones can't be served: told by the config, or by running them.

A serving engine puts tokens of many sequences side by side, in pieces. That is sound only if tokens
see each other through attention alone, which the paged cache computes, and depend on nothing but
their embedding and their position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mm_engine.errors import StartupError
from mm_engine.models.transformers_attention import (
    Unsupported,
    answering,
    foreign_code,
    tokens_apart,
)

#: Kinds of layers, as configs call them, that mix tokens through attention alone. Which tokens a
#: layer sees is then read from its mask.
ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})

NOT_BEHIND_INTERFACE = "its attention doesn't go through transformers' AttentionInterface"

#: Of the numbers' own size; what may differ where the same row is computed among other rows. A
#: low-precision router's rounding may send a token elsewhere, other mixing is far above both.
TOLERANCE = {torch.float32: 1e-3}
LOW_PRECISION_TOLERANCE = 5e-2


@contextmanager
def refusing(model_type: str) -> Iterator[None]:
    """Turn `Unsupported` into the error that ends startup, naming the backbone.

    Raises:
        StartupError: something in the block isn't supported.
    """
    try:
        yield
    except Unsupported as error:
        raise StartupError(
            f"text backbone can't be served: {model_type} ({error}). {error.remedy}"
        ) from error


def check_config(config: Any, max_len: int) -> Any:
    """The class of a config's model, which is of a kind that can be served up to `max_len` tokens.

    Raises:
        Unsupported: it isn't.
    """
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise Unsupported("transformers has no causal language model for it")
    found: Any = AutoModelForCausalLM._model_mapping[type(config)]
    model_class = found[0] if isinstance(found, tuple) else found
    kinds = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if kinds or model_class._is_stateful:
        raise Unsupported(f"layers other than attention: {', '.join(sorted(kinds)) or 'recurrent'}")
    if not getattr(config, "is_causal", True) or getattr(config, "is_encoder_decoder", False):
        raise Unsupported("attention that isn't causal, or that crosses to an encoder")
    _check_rope(config, max_len)
    return model_class


@contextmanager
def behind_interface(model_class: Any) -> Iterator[None]:
    """Say of a model that doesn't claim to use the interface and fails in any way why it did.

    Some use it without claiming to, so the claim alone tells nothing.

    Raises:
        Unsupported: something in the block isn't supported.
    """
    try:
        yield
    except Unsupported as error:
        if model_class._supports_attention_backend:
            raise
        raise Unsupported(NOT_BEHIND_INTERFACE) from error


def _check_rope(config: Any, max_len: int) -> None:
    """Some scalings turn to other frequencies once a prompt is long: its early keys go stale."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer_type = all(isinstance(value, dict) for value in parameters.values())
    for rope in parameters.values() if by_layer_type else [parameters]:
        kind = rope.get("rope_type", "default")
        limit = max_len
        if "dynamic" in kind:
            limit = config.max_position_embeddings
        elif kind == "longrope":
            limit = rope["original_max_position_embeddings"]
        if max_len > limit:
            raise Unsupported(
                f"rotary positions of type {kind}, which depend on a prompt's length beyond "
                f"{limit} tokens",
                f"Give a max_model_len of at most {limit}.",
            )


def check_behaviour(
    causal: Any,
    embed: Callable[[Tensor], Tensor],
    run: Callable[[Tensor, Tensor], Tensor],
    logits: Callable[[Tensor], Tensor],
    max_len: int,
) -> None:
    """Run the loaded model over a few tokens that can't see each other, to find other ways.

    `causal` is transformers' whole model; `embed`, `run` (embeddings and positions to hidden
    states) and `logits` (of the causal model, from hidden states) are its pieces, run apart.

    Raises:
        Unsupported: a token's output depends on the others, on the furthest position of the step,
            or on more than its embedding and position.
    """
    device = next(causal.parameters()).device
    ids = torch.arange(4, 8, device=device) % causal.config.vocab_size
    positions = torch.arange(4, device=device)
    far = positions.clone()
    far[:2] = torch.tensor([max_len - 1, max(max_len - 2, 0)], device=device)
    with answering(tokens_apart), torch.inference_mode(), foreign_code():
        embeddings = embed(ids)
        hidden = run(embeddings.clone(), positions)  # some models write to them
        # In front two rows that are no token's, as an image's are, and far away: the two tokens
        # behind them must not notice.
        others = (embeddings[:2] + embeddings[2:].flip(0)) / 2
        moved = run(torch.cat((others, embeddings[2:])), far)
        if differs(hidden[2:], moved[2:]):
            raise Unsupported("tokens that depend on others in another way than attention")
        whole = causal(input_ids=ids[None], position_ids=positions[None], use_cache=False)
        if differs(whole.logits[0], logits(hidden)):
            raise Unsupported("logits that depend on more than the tokens' embeddings")


def differs(expected: Tensor, got: Tensor) -> bool:
    """Whether two results are further apart than rounding brings them."""
    tolerance = TOLERANCE.get(expected.dtype, LOW_PRECISION_TOLERANCE)
    expected, got = expected.float(), got.float()
    if not bool(expected.isfinite().all()):
        return False  # broken weights: the worker says so, for each request
    size = expected.pow(2).mean().sqrt()
    # Not `>`: a NaN is no agreement.
    return not bool((expected - got).pow(2).mean().sqrt() <= tolerance * size)
