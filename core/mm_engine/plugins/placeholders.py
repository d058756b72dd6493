"""Placeholder tokens: which one a model uses, and how one becomes as many as its item needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from mm_engine.config import ModelContext
from mm_engine.errors import RequestError, StartupError
from mm_engine.request import PlaceholderRange, PromptInputs

MAX_COUNT = 2**20  # tokens of one item; a list of more would take the memory before it is refused


def placeholder_token_id(ctx: ModelContext) -> int:
    """Return the id of the token that stands for an image.

    It is the config's `image_token_id` (or `image_token_index`, as older configs call it), or else
    the tokenizer's image token.

    Raises:
        StartupError: neither names one, or the tokenizer doesn't have the config's.
    """
    for name in ("image_token_id", "image_token_index"):
        token_id = getattr(ctx.hf_config, name, None)
        if isinstance(token_id, int):
            if token_id < 0 or ctx.tokenizer.convert_ids_to_tokens(token_id) is None:
                raise StartupError(
                    f"the tokenizer has no token for the config's {name}: {token_id}. "
                    f"Add the image token to the tokenizer in {ctx.checkpoint}."
                )
            return token_id
    text = getattr(ctx.tokenizer, "image_token", None)
    token_id = ctx.tokenizer.convert_tokens_to_ids(text) if text else None
    if isinstance(token_id, int) and token_id != ctx.tokenizer.unk_token_id:
        return token_id
    raise StartupError(
        f"neither config nor tokenizer names the image token: {ctx.checkpoint}. "
        "Set image_token_id in config.json to the id of a token that the tokenizer has."
    )


def image_token(ctx: ModelContext) -> str:
    """Return the text of the token that stands for an image.

    Raises:
        StartupError: there is no such token.
    """
    token_id = placeholder_token_id(ctx)
    text = getattr(ctx.tokenizer, "image_token", None)
    if isinstance(text, str) and ctx.tokenizer.convert_tokens_to_ids(text) == token_id:
        return text
    return str(ctx.tokenizer.convert_ids_to_tokens(token_id))


def expand_placeholders(
    inputs: PromptInputs,
    token_id: int,
    counts: Sequence[int] | Mapping[str, Sequence[int]],
    *,
    text: str | None = None,
) -> PromptInputs:
    """Return `inputs` with each `token_id` repeated as often as its item needs, and the ranges.

    `counts` are the token counts of the items in prompt order: of images, or of another modality
    given as `{modality: counts}`. A prompt in which every placeholder is already expanded to just
    these counts keeps its ids. `text` is what the caller may write for one item; the message of
    the error below names it.

    Raises:
        RequestError: the prompt doesn't have one placeholder for each item.
        ValueError: a count is below 1 or beyond all reason (2**20), or `counts` has more than one
            modality.
    """
    by_modality = dict(counts) if isinstance(counts, Mapping) else {"image": counts}
    if len(by_modality) != 1:
        raise ValueError(f"expected the counts of one modality, got {sorted(by_modality)}")
    ((modality, lengths),) = by_modality.items()
    if any(not 1 <= length <= MAX_COUNT for length in lengths):
        raise ValueError(f"expected counts of 1 to {MAX_COUNT}, got {list(lengths)}")
    ids = inputs.prompt_token_ids or ()
    num_found = ids.count(token_id)
    if num_found == len(lengths):
        new_ids = _expanded(ids, token_id, lengths)
    elif num_found == sum(lengths):
        new_ids = ids
    else:
        marker = text or f"placeholder token (id {token_id})"
        raise RequestError(
            f"the prompt has {_plural(num_found, 'placeholder')} for "
            f"{_plural(len(lengths), modality)}. Put one {marker} in the text for each {modality}.",
            param="prompt",
        )
    ranges = _ranges(new_ids, token_id, lengths, modality)
    return dataclasses.replace(inputs, prompt_token_ids=new_ids, placeholders=ranges)


def _expanded(ids: tuple[int, ...], token_id: int, lengths: Sequence[int]) -> tuple[int, ...]:
    remaining = iter(lengths)
    new_ids: list[int] = []
    for token in ids:
        new_ids += [token] * next(remaining) if token == token_id else [token]
    return tuple(new_ids)


def _ranges(
    ids: tuple[int, ...], token_id: int, lengths: Sequence[int], modality: str
) -> tuple[PlaceholderRange, ...]:
    ranges = []
    offset = 0
    for item, length in enumerate(lengths):
        offset = ids.index(token_id, offset)
        if any(token != token_id for token in ids[offset : offset + length]):
            raise RequestError(
                f"the placeholder tokens of {modality} {item} are not in one piece. "
                f"Put one placeholder, or {length} in a row, for it.",
                param="prompt",
            )
        ranges.append(PlaceholderRange(modality, item, offset, length))
        offset += length
    return tuple(ranges)


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
