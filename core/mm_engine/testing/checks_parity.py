"""Parity with transformers: the first stage that differs is named, and by how much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from mm_engine.errors import RequestError
from mm_engine.request import Request
from mm_engine.testing.compare import LOGITS_TOLERANCE, difference, first_untied
from mm_engine.testing.engine_run import Watched, answered, request_of
from mm_engine.testing.fault import Skip
from mm_engine.testing.oracle import Oracle, Refused
from mm_engine.testing.parity import ImageParity, Stage, image_parity
from mm_engine.testing.prompts import TestPrompt, prompts, shapes
from mm_engine.testing.registry import check
from mm_engine.testing.sizes import picture

if TYPE_CHECKING:
    from mm_engine.testing.subject import Subject

NUM_TOKENS = 16
STAGES = ("pixels", "tower", "projector", "rows")


@dataclass(slots=True)
class PromptParity:
    """One prompt through both models, up to the logits of its last token."""

    prompt: TestPrompt
    request: Request
    inputs: dict[str, Tensor]
    expected_merged: Tensor | None
    expected_logits: Tensor
    watched: Watched  # of the request alone, one token


def image_parities(subject: Subject) -> list[ImageParity]:
    """Every stage of a few images, made once."""
    if "images" not in subject.memory:
        oracle, found = subject.require_oracle(), []
        for seed, size in enumerate(shapes(subject)):
            try:
                found.append(image_parity(subject, oracle, picture(size, seed)))
            except (Refused, RequestError):  # one of the two doesn't take this shape
                continue
        subject.memory["images"] = found
    parities: list[ImageParity] = subject.memory["images"]
    if not parities:
        raise Skip("transformers and the plugin take none of the images that were tried")
    return parities


def stage_of(subject: Subject, name: str, hook: str) -> str:
    """Report one stage over all images.

    What differs on the way but makes no difference in the rows is the plugin's own affair.
    """
    parities = image_parities(subject)
    stages: list[Stage] = [getattr(parity, name) for parity in parities]
    for parity, stage in zip(parities, stages, strict=True):
        if stage.gap is not None and parity.rows.gap is not None:
            width, height = parity.size
            what = f"{stage.what}, for an image of {width}x{height} pixels"
            if stage.error is not None:
                raise stage.error
            raise subject.blame(hook, f"transformers' {what}", stage.gap, stage.hint)
    reason = next((stage.skipped for stage in stages if stage.skipped), None)
    if reason is not None:
        raise Skip(reason)
    others = [stage.gap for stage in stages if stage.gap]
    if others:
        return f"{stages[0].what}: {others[0]}, but the rows are transformers'"
    return f"{stages[0].what}, {len(stages)} images"


@check("parity-pixel-values")
def parity_pixel_values(subject: Subject) -> str:
    """The mapper gives what the checkpoint's image processor gives."""
    return stage_of(subject, "pixels", "register_input_mapper")


@check("parity-tower")
def parity_tower(subject: Subject) -> str:
    """The projector is given what transformers' is given."""
    return stage_of(subject, "tower", "embed_images")


@check("parity-projector")
def parity_projector(subject: Subject) -> str:
    """The projector returns what transformers' returns."""
    return stage_of(subject, "projector", "embed_images")


@check("parity-image-rows")
def parity_image_rows(subject: Subject) -> str:
    """`embed_images` returns the rows of `get_image_features`."""
    return stage_of(subject, "rows", "embed_images")


def prompt_parities(subject: Subject) -> list[PromptParity]:
    """A few prompts through both models, made once."""
    if "prompts" not in subject.memory:
        oracle, found = subject.require_oracle(), []
        for index, prompt in enumerate(prompts(subject, NUM_TOKENS)):
            request = request_of(subject, prompt.ids, prompt.images, 1, f"p{index}")
            try:
                inputs = _inputs(subject, oracle, prompt, request)
                merged, logits = oracle.merged(inputs)
            except Refused as error:
                raise Skip(f"transformers doesn't take the prompt: {error}") from error
            watched, _ = answered(subject, [request])
            found.append(PromptParity(prompt, request, inputs, merged, logits, watched))
        subject.memory["prompts"] = found
    parities: list[PromptParity] = subject.memory["prompts"]
    return parities


def _inputs(
    subject: Subject, oracle: Oracle, prompt: TestPrompt, request: Request
) -> dict[str, Tensor]:
    """The prompt as transformers is given it: with the text that the plugin puts among rows."""
    ids = request.prompt_token_ids
    places = [item.placeholder for item in request.items]
    if any(subject.text_in(ids[place.offset : place.end]) for place in places):
        return oracle.inputs_of(ids, prompt.images)
    return oracle.inputs(prompt.ids, prompt.images)


@check("parity-merged")
def parity_merged(subject: Subject) -> str:
    """The text backbone is given transformers' embeddings: text and images in their places."""
    parities = prompt_parities(subject)
    for parity in parities:
        if parity.expected_merged is None:
            raise Skip("transformers' text backbone isn't given embeddings")
        name = parity.request.request_id
        gap = difference(parity.expected_merged, parity.watched.merged[name][0])
        logits = difference(
            parity.expected_logits, parity.watched.logits[name][0], LOGITS_TOLERANCE
        )
        if gap is not None and logits is not None:
            hook, hint = _at_fault(parity)
            num_images = len(parity.prompt.images)
            expected = f"transformers' embeddings of a prompt with {num_images} images"
            raise subject.blame(hook, expected, gap, hint)
    return f"{len(parities)} prompts"


def _at_fault(parity: PromptParity) -> tuple[str, str]:
    """Whether text or image rows differ, and what that points to."""
    ours = parity.watched.merged[parity.request.request_id][0]
    theirs = parity.expected_merged
    if theirs is None or ours.shape != theirs.shape:
        return "input_processor", "the prompt's length: how many tokens are its images?"
    image = {
        position
        for item in parity.request.items
        for position in range(item.placeholder.offset, item.placeholder.end)
    }
    text = [position for position in range(len(ours)) if position not in image]
    if text and difference(theirs[text], ours[text]) is not None:
        return "embed_tokens", "text embeddings: their weights, a scale; or ranges that are shifted"
    return "input_processor", "the ranges: their offsets, and which item each one is for"


@check("parity-logits")
def parity_logits(subject: Subject) -> str:
    """The logits after the prompt are transformers'."""
    parities = prompt_parities(subject)
    for parity in parities:
        got = parity.watched.logits[parity.request.request_id][0]
        gap = difference(parity.expected_logits, got, LOGITS_TOLERANCE)
        if gap is not None:
            raise subject.blame(
                "forward",
                f"transformers' logits after a prompt with {len(parity.prompt.images)} images",
                gap,
                "the text backbone: its config, its weights, its head; compute_logits",
            )
    return f"{len(parities)} prompts, {len(parities[0].expected_logits)} logits each"


@check("parity-text")
def parity_text(subject: Subject) -> str:
    """Greedy answers are transformers', with all prompts in one batch."""
    oracle, parities = subject.require_oracle(), prompt_parities(subject)
    requests = [
        request_of(subject, p.prompt.ids, p.prompt.images, NUM_TOKENS, p.request.request_id)
        for p in parities
    ]
    got, _ = answered(subject, requests)
    for parity, request in zip(parities, requests, strict=True):
        name = request.request_id
        try:
            expected = oracle.answer(parity.inputs, NUM_TOKENS)
        except Refused as error:
            raise Skip(f"transformers doesn't answer: {error}") from error
        found = first_untied(expected, got.tokens[name], got.logits[name])
        if found is not None:
            position, gap = found
            raise subject.blame(
                "forward",
                f"transformers' greedy answer: {expected}",
                f"{got.tokens[name]}, which parts at token {position} by {gap:.3g}",
                "the prompt's logits agree: positions or the cache in decode",
            )
    return f"{len(parities)} answers of {NUM_TOKENS} tokens in one batch"
