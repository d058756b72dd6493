"""The prompt that measures peak memory: images and text up to a length."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mm_engine.config import ModelContext
from mm_engine.errors import StartupError
from mm_engine.plugins.placeholders import placeholder_token_id
from mm_engine.request import PromptInputs


def dummy_prompt(
    ctx: ModelContext,
    seq_len: int,
    counts: Mapping[str, int],
    max_tokens: Callable[[str], int],
    *,
    size: tuple[int, int],
) -> PromptInputs:
    """Return `counts["image"]` images and then text: `seq_len` tokens once they are expanded.

    `size` is the (width, height) in pixels of an image that takes `max_tokens("image")` tokens.
    There is at least one token of text. Images that don't fit in `ctx.max_model_len` together are
    left out.

    Raises:
        StartupError: not even one image fits.
    """
    from PIL import Image  # here: the command line imports this package to list plugins

    wanted = counts.get("image", 0)
    ids: list[int] = []
    num_text_tokens = min(seq_len, ctx.max_model_len)
    if wanted:
        each = max_tokens("image")
        num_items = min(wanted, (ctx.max_model_len - 1) // each)
        if num_items == 0:
            raise StartupError(
                f"an image doesn't fit in max_model_len: it takes {each} tokens of "
                f"{ctx.max_model_len}. Raise --max-model-len, or set --limit-mm-per-prompt image=0."
            )
        ids = [placeholder_token_id(ctx)] * num_items
        num_text_tokens -= num_items * each
    images = tuple(Image.new("RGB", size) for _ in ids)
    ids += [_filler_token(ctx)] * max(1, num_text_tokens)
    data = {"image": images} if images else {}
    return PromptInputs(prompt_token_ids=tuple(ids), multi_modal_data=data)


def _filler_token(ctx: ModelContext) -> int:
    special = set(ctx.tokenizer.all_special_ids)
    ids = ctx.tokenizer.encode("a", add_special_tokens=False)
    return next((token for token in ids if token not in special), 0)
