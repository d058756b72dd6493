"""What can never be computed is refused when it comes, not in mid-flight."""

from __future__ import annotations

from mm_engine.engine.encoder_cache import EncoderCache
from mm_engine.engine.kv_cache import KVCache
from mm_engine.errors import RequestError
from mm_engine.request import Request


def check_request(
    request: Request, *, max_model_len: int, kv_cache: KVCache, encoder_cache: EncoderCache
) -> None:
    """Refuse what could never be computed, even alone.

    Raises:
        RequestError: the request is empty, doesn't say how long its answer may be, or doesn't fit
            the pool, the encoder cache or the model.
    """
    num_prompt_tokens = len(request.prompt_token_ids)
    max_tokens = request.sampling_params.max_tokens
    if not request.prompt_token_ids:
        raise RequestError("The prompt is empty. Send at least one token.", param="prompt")
    if max_tokens is None:
        raise RequestError("max_tokens is not set. Set it.", param="max_tokens")
    if num_prompt_tokens + max_tokens > kv_cache.max_tokens:
        raise RequestError(
            f"Prompt and max_tokens exceed the KV cache: {num_prompt_tokens} + {max_tokens} "
            f"of {kv_cache.max_tokens} tokens. Shorten the prompt or lower max_tokens.",
            param="max_tokens",
        )
    for item in request.items:
        if item.placeholder.length > encoder_cache.max_rows:
            raise RequestError(
                f"{item.modality} {item.placeholder.item} exceeds the encoder cache: "
                f"{item.placeholder.length} of {encoder_cache.max_rows} tokens. "
                "Send a smaller one.",
                param="messages",
            )
    if num_prompt_tokens + max_tokens > max_model_len:
        raise RequestError(
            f"Prompt and max_tokens exceed the model's length: {num_prompt_tokens} + "
            f"{max_tokens} of {max_model_len} tokens. Shorten the prompt or lower max_tokens.",
            param="max_tokens",
        )
