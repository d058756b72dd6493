"""The hooks of the front process: the mapper, the processor, the placeholder's text."""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm_engine.errors import PluginError, RequestError
from mm_engine.inputs.media import to_rgb
from mm_engine.plugins.blame import kind_of
from mm_engine.request import PromptInputs
from mm_engine.testing.fault import Fault, fault_of
from mm_engine.testing.oracle import Refused
from mm_engine.testing.registry import check
from mm_engine.testing.sizes import MODES, Size, picture, picture_of_mode

if TYPE_CHECKING:
    from PIL import Image

    from mm_engine.inputs.pipeline import PreparedPrompt
    from mm_engine.testing.subject import Subject

MAPPER = "register_input_mapper"
QUESTION = " What is in the picture?"


def usual_sizes(subject: Subject) -> list[Size]:
    """Sizes that no plugin may have trouble with: small and large, upright and lying."""
    side = max((s for s in subject.geometry.sides if s < 1000), default=336)
    return [(side, side), (2 * side, side), (side + 3, 2 * side - 5), (40, 30), (23, 61)]


@check("mapper-tensors")
def mapper_tensors(subject: Subject) -> str:
    """The mapper gives finite CPU tensors, the same each time, and leaves the image as it was.

    `Plugin.map_item` checks what one call shows; this is about the second call, and the numbers.
    """
    kinds: dict[str, str] = {}
    for size in usual_sizes(subject):
        image = picture(size)
        first, second = subject.map(image), subject.map(image)
        for name, tensor in first.items():
            if not _equal(tensor, second[name]):
                raise subject.blame(
                    MAPPER,
                    f"the same {name} each time for the same image",
                    "two that differ",
                    "features are cached by the image's content: leave out augmentation, and "
                    "seed what is random",
                )
            allowed = {torch.float32, subject.ctx.dtype}
            if tensor.is_floating_point() and tensor.dtype not in allowed:
                raise subject.blame(
                    MAPPER,
                    f"float32 numbers in {name}, as image processors give them",
                    kind_of(tensor),
                    "drop the conversion: the engine moves tensors to the device, and the tower "
                    "casts them",
                )
            kinds[name] = kind_of(tensor).removeprefix("Tensor ").strip("()")
    return "; ".join(f"{name}: {kind}" for name, kind in kinds.items())


def _equal(first: Tensor, second: Tensor) -> bool:
    same = first.shape == second.shape and first.dtype == second.dtype
    return same and torch.equal(first, second)


@check("mapper-keys")
def mapper_keys(subject: Subject) -> str:
    """The mapper's tensors are what `embed_images` takes as keywords."""
    tensors = subject.map(picture(usual_sizes(subject)[0]))
    method = getattr(subject.model, "embed_images", None)
    if not callable(method):
        raise subject.blame("embed_images", "a method of the model", kind_of(method))
    parameters = inspect.signature(method).parameters
    try:
        inspect.signature(method).bind(**tensors)
    except TypeError:
        raise _keys_fault(subject, sorted(tensors), sorted(parameters)) from None
    return ", ".join(sorted(tensors))


def _keys_fault(subject: Subject, keys: list[str], keywords: list[str]) -> Fault:
    """Blame who of mapper and model departs from the image processor's names; if both do, both."""
    hint = "each tensor of the mapper reaches embed_images as the keyword of its name"
    names: set[str] = set()
    if subject.oracle is not None:
        with contextlib.suppress(Refused):
            names = set(subject.oracle.mapped([picture(usual_sizes(subject)[0])]))
    theirs = MAPPER in subject.plugin.hooks
    if not theirs or (set(keys) <= names and not set(keywords) <= names):
        expected = f"keywords named as the image processor's tensors: {keys}"
        if not theirs and set(keywords) < set(keys):
            hint += ", or register a mapper that returns only what the model takes"
        return subject.blame("embed_images", expected, str(keywords), hint)
    fault = subject.blame(
        MAPPER, f"tensors named as embed_images' keywords: {keywords}", str(keys), hint
    )
    if not (set(keywords) - set(keys) <= names and names):
        other = subject.blame("embed_images", "", "")
        fault.hook, fault.place = f"{MAPPER} or embed_images", f"{fault.place}, {other.place}"
    return fault


@check("image-modes")
def image_modes(subject: Subject) -> str:
    """A picture in any of PIL's modes gives what its conversion to RGB gives."""
    size = usual_sizes(subject)[-1]
    for mode in MODES:
        image = picture_of_mode(mode, size)
        got, expected = _prepared(subject, image), _prepared(subject, to_rgb(image))
        ours, theirs = got.items[0].tensors, expected.items[0].tensors
        different = [name for name in theirs if not _equal(ours[name], theirs[name])]
        if different:
            raise subject.blame(
                MAPPER,
                f"for a picture of mode {mode} what its conversion to RGB gives",
                f"another {different[0]}",
                "a mapper is always given RGB; does it depend on anything but the pixels?",
            )
    return ", ".join(MODES)


def _prepared(subject: Subject, *images: Image.Image) -> PreparedPrompt:
    ids = tuple(subject.ctx.tokenizer("a")["input_ids"])
    ids += (subject.placeholder_id,) * len(images)
    data = {"image": images}
    return subject.unlimited_pipeline.prepare(
        PromptInputs(prompt_token_ids=ids, multi_modal_data=data)
    )


@check("placeholder-text")
def placeholder_text(subject: Subject) -> str:
    """The text for an image holds the placeholder token just once."""
    for index in (0, 1, 2):
        text = subject.plugin.placeholder_text(subject.ctx, "image", index)
        ids = subject.ctx.tokenizer.encode(text, add_special_tokens=False)
        number = ids.count(subject.placeholder_id)
        if number != 1:
            token = subject.ctx.tokenizer.convert_ids_to_tokens(subject.placeholder_id)
            raise subject.blame(
                "placeholder_text",
                f"a text with one token {token} (id {subject.placeholder_id}) for image {index}",
                f"{text!r} with {number} of it",
                "is image_token_id of config.json the tokenizer's image token?",
            )
    return repr(subject.plugin.placeholder_text(subject.ctx, "image", 0))


@check("processor")
def processor(subject: Subject) -> str:
    """Text and ids give one prompt; several images lie in order; what was given isn't changed."""
    sizes = usual_sizes(subject)
    text = subject.plugin.placeholder_text(subject.ctx, "image", 0)
    for number in (1, min(3, subject.ctx.limits["image"])):
        for start in range(0, len(sizes), number):
            images = tuple(picture(size) for size in sizes[start : start + number])
            before = [image.tobytes() for image in images]
            data = {"image": images}
            prompt = QUESTION.join(["", *[text] * len(images)]) + QUESTION
            ids = tuple(subject.ctx.tokenizer(prompt)["input_ids"])
            by_text = subject.unlimited_pipeline.prepare(
                PromptInputs(prompt=prompt, multi_modal_data=data)
            )
            by_ids = subject.unlimited_pipeline.prepare(
                PromptInputs(prompt_token_ids=ids, multi_modal_data=data)
            )
            if before != [image.tobytes() for image in images]:
                raise subject.blame("input_processor", "the given images unchanged", "one modified")
            _compare(subject, by_text, by_ids)
            lengths = [item.placeholder.length for item in by_ids.items]
            alone = [subject.expand([image])[0] for image in images]
            if lengths != alone:
                raise subject.blame(
                    "input_processor",
                    f"{alone} tokens for {len(images)} images, as each takes alone",
                    str(lengths),
                    "does it take the counts in the order of the items?",
                )
    return "text and ids agree, with one image and with several"


def _compare(subject: Subject, by_text: PreparedPrompt, by_ids: PreparedPrompt) -> None:
    places = [[item.placeholder for item in prepared.items] for prepared in (by_text, by_ids)]
    if by_text.prompt_token_ids != by_ids.prompt_token_ids or places[0] != places[1]:
        raise subject.blame(
            "input_processor",
            f"the same {len(by_text.prompt_token_ids)} tokens for a text and for its token ids",
            f"{len(by_ids.prompt_token_ids)} tokens for the ids",
            "inputs.prompt is None where ids were given: work on inputs.prompt_token_ids",
        )


@check("wrong-placeholders")
def wrong_placeholders(subject: Subject) -> str:
    """A prompt with too few or too many placeholders is the caller's fault, and is told so."""
    size = usual_sizes(subject)[-1]
    length = subject.expand([picture(size)])[0]
    too_many = next(number for number in (3, 4) if number != length)
    for num_images, num_placeholders in ((1, 0), (2, 1), (1, too_many)):
        images = tuple(picture(size, seed) for seed in range(num_images))
        ids = tuple(subject.ctx.tokenizer("a")["input_ids"])
        ids += (subject.placeholder_id,) * num_placeholders
        inputs = PromptInputs(prompt_token_ids=ids, multi_modal_data={"image": images})
        wanted = f"a RequestError for {num_placeholders} placeholders and {num_images} images"
        hint = "expand_placeholders counts them; raise RequestError where you do it yourself"
        try:
            prepared = subject.unlimited_pipeline.prepare(inputs)
        except RequestError:
            continue
        except PluginError as error:
            raise subject.blame("input_processor", wanted, fault_of(error).got, hint) from error
        got = f"a prompt of {len(prepared.prompt_token_ids)} tokens"
        raise subject.blame("input_processor", wanted, got, hint)
    return "too few and too many are refused"
