"""The contract of the hooks: what a mapper and a processor may return. Each check gives a fact.

A fact is the part of a message after the place: `expected …, got …`; None means all is well.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from PIL import Image, ImageChops
from torch import Tensor

from mm_engine.plugins.blame import kind_of
from mm_engine.request import PlaceholderRange, PromptInputs


def fault_of_mapped(tensors: object) -> str | None:
    """Say what is wrong with a mapper's result for one item."""
    if not isinstance(tensors, Mapping):
        return f"expected a dict of tensors, got {kind_of(tensors)}"
    if not tensors:
        return "expected at least one tensor, got an empty dict"
    for name, tensor in tensors.items():
        if not (isinstance(name, str) and name.isidentifier()):
            return f"expected names that can be keyword arguments, got {name!r}"
        if not isinstance(tensor, Tensor):
            return f"expected a tensor for {name}, got {kind_of(tensor)}"
        if tensor.device.type != "cpu":
            return f"expected {name} on the CPU, got it on {tensor.device}"
        if tensor.layout != torch.strided:
            return f"expected a dense tensor for {name}, got layout {tensor.layout}"
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return f"expected finite numbers in {name}, got NaN or infinity"
    return None


def copy_of(item: object) -> object:
    """Return an image's copy, for a hook to have; anything else as it is."""
    return item.copy() if isinstance(item, Image.Image) else item


def equal_items(given: object, original: object) -> bool:
    """Say whether a hook left the copy that it was given as it was."""
    if not (isinstance(given, Image.Image) and isinstance(original, Image.Image)):
        return given is original
    if (given.size, given.mode) != (original.size, original.mode):
        return False
    if given.mode != "RGB":  # the pipeline's images are; the cheaper comparison is for these
        return given.tobytes() == original.tobytes()
    return ImageChops.difference(given, original).getbbox() is None


def copies_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an item's tensors as copies, for a hook to have."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def equal_tensors(given: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> bool:
    """Say whether a hook left the copies that it was given as they were."""
    return given.keys() == originals.keys() and all(
        torch.equal(given[name], tensor) for name, tensor in originals.items()
    )


def fingerprint(inputs: PromptInputs) -> Hashable:
    """Return a value that changes when a processor changes what it was given."""
    tensors = (
        (modality, item, name, id(tensor), tuple(tensor.shape), _version(tensor))
        for modality, items in inputs.mapped.items()
        for item, named in enumerate(items)
        for name, tensor in named.items()
    )
    data = ((modality, *map(id, items)) for modality, items in inputs.multi_modal_data.items())
    return (inputs.prompt, inputs.prompt_token_ids, inputs.placeholders, *tensors, *data)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # inference tensors don't count writes


def fault_of_processed(
    given: PromptInputs, got: object, max_tokens: Callable[[str], int]
) -> str | None:
    """Say what is wrong with a processor's result; `max_tokens(modality)` limits one item."""
    if not isinstance(got, PromptInputs):
        return f"expected PromptInputs, got {kind_of(got)}"
    ids = got.prompt_token_ids
    if not isinstance(ids, tuple):
        return f"expected prompt_token_ids to be a tuple, got {kind_of(ids)}"
    bad = next((token for token in ids if type(token) is not int or token < 0), None)
    if bad is not None:
        return f"expected token ids, got {kind_of(bad)}"
    return (
        _fault_of_ranges(got.placeholders, len(ids))
        or _fault_of_items(given, got.placeholders, max_tokens)
        or _fault_of_text(given.prompt_token_ids or (), ids, got.placeholders)
    )


def _fault_of_ranges(ranges: object, num_tokens: int) -> str | None:
    if not isinstance(ranges, tuple):
        return f"expected placeholders to be a tuple, got {kind_of(ranges)}"
    end = 0
    for place in ranges:
        if not isinstance(place, PlaceholderRange):
            return f"expected placeholders to hold PlaceholderRange, got {kind_of(place)}"
        for name in ("item", "offset", "length"):
            value = getattr(place, name)
            if type(value) is not int:
                return f"expected the {name} of a range to be an int, got {kind_of(value)}"
        if place.offset < end:
            return f"expected ranges in order and apart, got one at {place.offset} after {end}"
        end = place.offset + max(place.length, 0)
        if end > num_tokens:
            return f"expected ranges within {num_tokens} tokens, got one that ends at {end}"
    return None


def _fault_of_items(
    given: PromptInputs, ranges: Sequence[PlaceholderRange], max_tokens: Callable[[str], int]
) -> str | None:
    placed: dict[str, list[int]] = {modality: [] for modality in given.mapped}
    for place in ranges:
        if place.modality not in placed:
            return f"expected ranges for {sorted(placed)}, got one for {place.modality!r}"
        most, what = max_tokens(place.modality), f"{place.modality} {place.item}"
        if place.length < 1:
            return f"expected at least 1 placeholder token for {what}, got {place.length}"
        if place.length > most:
            return (
                f"expected at most {most} placeholder tokens for {what} (what max_tokens says), "
                f"got {place.length}"
            )
        placed[place.modality].append(place.item)
    for modality, items in given.mapped.items():
        numbers = placed[modality]
        if len(numbers) != len(items):
            return f"expected {len(items)} ranges of modality {modality}, got {len(numbers)}"
        if numbers != list(range(len(items))):
            return f"expected {modality} ranges numbered 0 to {len(items) - 1}, got {numbers}"
    return None


def _fault_of_text(
    given: Sequence[int], got: Sequence[int], ranges: Sequence[PlaceholderRange]
) -> str | None:
    """Compare the ids outside of the ranges with the prompt's.

    In the prompt, one token stands where each range is now (which one is the plugin's affair), or
    the prompt had the range's tokens already.
    """
    if tuple(given) == tuple(got):
        for place in ranges:
            if len(set(got[place.offset : place.end])) != 1:
                what = f"{place.modality} {place.item}"
                return f"expected {place.length} placeholder tokens for {what}, got text among them"
        return None
    outside: list[int] = []
    one_each: list[int] = []  # positions in the prompt of the tokens that were expanded
    position = 0
    for place in ranges:
        outside += got[position : place.offset]
        one_each.append(len(outside) + len(one_each))
        position = place.end
    outside += got[position:]
    skipped = set(one_each)
    text = [token for index, token in enumerate(given) if index not in skipped]
    if len(text) != len(outside):
        return f"expected {len(text)} tokens of text outside of the ranges, got {len(outside)}"
    if text != outside:
        where = next(index for index in range(len(text)) if text[index] != outside[index])
        return (
            f"expected the prompt's text unchanged, got token {outside[where]} instead of "
            f"{text[where]} (text token {where})"
        )
    return None
