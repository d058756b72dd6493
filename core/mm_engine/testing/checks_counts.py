"""The number that everything hangs on: how many tokens an image takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm_engine.errors import MMEngineError, RequestError
from mm_engine.testing.counting import Count, counted, counts_of
from mm_engine.testing.fault import Fault, fault_of
from mm_engine.testing.oracle import Refused
from mm_engine.testing.registry import check
from mm_engine.testing.sizes import picture, shrink

if TYPE_CHECKING:
    from mm_engine.testing.subject import Subject

MAPPER = "register_input_mapper"
ONE_FORMULA = "one function should give the count to max_tokens, input_processor and dummy_data"
STAGES = "the parity checks below: the first stage that differs may say why"
SWAPPED = "sizes are (height, width) in transformers, (width, height) in PIL"
ROWS = (
    "rows too many or too few: the class token, newlines, padding cut off by rounding, height and "
    "width swapped"
)


@check("counts")
def counts(subject: Subject) -> str:
    """Placeholders expanded, rows encoded, and transformers' rows are one number for any size."""
    found = counts_of(subject)
    wrong = [count for count in found if not count.agree]
    if wrong:
        first = min(wrong, key=lambda count: count.size[0] * count.size[1])
        smallest = next((count for count in wrong if count.hangs), None)
        if smallest is None:
            size = shrink(first.size, lambda size: not counted(subject, size).agree)
            smallest = first if size == first.size else counted(subject, size)
        raise _blamed(subject, smallest, f"at {len(wrong)} of {len(found)} sizes tried")
    refused = [count for count in found if count.refused]
    taken = [count.truth for count in found if not count.refused]
    if not taken:
        raise subject.blame(MAPPER, "images that are taken", f"all refused: {refused[0].refused}")
    said = f"{len(taken)} sizes take {min(taken)}"
    said += f" to {max(taken)} tokens" if min(taken) < max(taken) else " tokens each"
    if subject.oracle is None:
        said += f" (without transformers' own count: {subject.no_oracle})"
    if refused:
        width, height = refused[0].size
        said += f"; {len(refused)} sizes are refused, such as {width}x{height}"
    return said


def _blamed(subject: Subject, count: Count, where: str) -> Fault:
    image = f"an image of {count.size[0]}x{count.size[1]} pixels, the smallest found ({where})"
    tensors = _beside(subject, count)
    mapped = _mapped_fault(subject, count, tensors)
    if count.error is not None:
        fault = fault_of(count.error)
        if mapped is not None and fault.hook == "embed_images":
            return mapped
        if fault.hook == "embed_images":
            fault.hint = fault.hint or _batch_hint(tensors) or STAGES
        fault.got += f", for {image}"
        return fault
    processor = "input_processor"
    if processor not in subject.plugin.hooks:  # core's default does as max_tokens says
        processor = "max_tokens"
    if count.theirs is None:
        fault = subject.blame(
            f"{processor}",
            f"{count.rows} placeholder tokens for {image}, as many as embed_images makes rows",
            str(count.expanded),
            f"which of the two is right? {ONE_FORMULA}",
        )
        other = subject.blame("embed_images", "", "")
        fault.hook, fault.place = f"{fault.hook} or embed_images", f"{fault.place}, {other.place}"
        return fault
    if count.rows == count.theirs:
        expected = f"{count.theirs} placeholder tokens for {image}: so many rows embed_images makes"
        return subject.blame(processor, expected, str(count.expanded), ONE_FORMULA)
    if mapped is not None:
        return mapped
    expected = f"{count.theirs} rows for {image}, as transformers makes them"
    if count.num_text:
        expected += f" with the {count.num_text} text tokens that stand among them"
    if count.expanded == count.theirs:
        expected += f" and {processor} expects them"
        return subject.blame("embed_images", expected, str(count.rows), ROWS)
    fault = subject.blame(
        processor, expected, f"{count.expanded} placeholder tokens, {count.rows} rows", ROWS
    )
    other = subject.blame("embed_images", "", "")
    fault.hook, fault.place = f"{fault.hook} and embed_images", f"{fault.place}, {other.place}"
    return fault


def _beside(subject: Subject, count: Count) -> dict[str, tuple[Tensor, Tensor]]:
    """By name the plugin's own mapper's tensors beside the image processor's of the same name."""
    if subject.oracle is None or count.mapped is None or MAPPER not in subject.plugin.hooks:
        return {}
    try:
        theirs = subject.oracle.mapped([picture(count.size)])
    except Refused:
        return {}
    return {n: (tensor, theirs[n]) for n, tensor in count.mapped.items() if n in theirs}


def _mapped_fault(
    subject: Subject, count: Count, tensors: dict[str, tuple[Tensor, Tensor]]
) -> Fault | None:
    """What of the mapper's tensors differs in kind from the image processor's."""
    width, height = count.size
    for name, (tensor, wanted) in tensors.items():
        wanted = wanted[0] if wanted.ndim > tensor.ndim and len(wanted) == 1 else wanted
        differs = tensor.shape != wanted.shape
        if not differs and not tensor.is_floating_point() and tensor.numel() < 100:
            differs = not torch.equal(tensor.to(wanted.dtype), wanted)
        if differs:
            small = wanted.numel() < 10
            values = [t.tolist() if small else list(t.shape) for t in (wanted, tensor)]
            what = name if small else f"the shape of {name}"
            return subject.blame(
                MAPPER,
                f"{what} {values[0]} for an image {width} pixels wide and {height} high, as the "
                "image processor gives it",
                str(values[1]),
                SWAPPED if small else "is the image processor called as transformers calls it?",
            )
    return None


def _batch_hint(tensors: dict[str, tuple[Tensor, Tensor]]) -> str:
    """Name the tensor that looks as the image processor gives it: with a batch dimension."""
    for name, (tensor, wanted) in tensors.items():
        if tensor.shape == wanted.shape and len(tensor) == 1:
            return (
                f"the mapper's {name} is {list(tensor.shape)}, as the image processor gives it "
                "for a batch of one image: is the batch dimension still there?"
            )
    return ""


@check("max-tokens")
def max_tokens(subject: Subject) -> str:
    """No size takes more than `max_tokens`, and there is one that takes just as many."""
    most = subject.plugin.max_tokens(subject.ctx, "image")
    taken = [count for count in counts_of(subject) if not count.refused]
    largest = max(taken, key=lambda count: count.truth)
    width, height = largest.size
    if largest.truth > most:
        raise subject.blame(
            "max_tokens",
            f"at least {largest.truth}: so many an image of {width}x{height} pixels takes",
            str(most),
            "find the costliest size by going through all that the config allows",
        )
    if largest.truth == most:
        return f"{most}, reached by {width}x{height}"
    try:
        dummy = subject.plugin.dummy_data(subject.ctx, most + 16, {"image": 1})
        (image,) = dummy.multi_modal_data["image"]
        reached = subject.expand([image])[0]
    except (MMEngineError, ValueError, KeyError):
        return f"{most}; no size of the sweep reaches it (at most {largest.truth})"
    if reached < most:
        raise subject.blame(
            "max_tokens",
            f"{max(reached, largest.truth)}: nothing that was tried takes more, nor dummy_data",
            str(most),
            "memory is set aside for max_tokens; is it a count that no image can have?",
        )
    return f"{most}, reached by the dummy data"


@check("dummy-data")
def dummy_data(subject: Subject) -> str:
    """The dummy prompt is as long as asked, and its items are the costliest there are."""
    ctx, plugin = subject.ctx, subject.plugin
    most = plugin.max_tokens(ctx, "image")
    limit = ctx.max_model_len - 1
    asked = 0
    for number in dict.fromkeys((1, min(2, ctx.limits["image"]), ctx.limits["image"], 0)):
        if number * most > limit:
            continue
        for extra in (1, 16, 500):
            seq_len = number * most + extra
            if seq_len > limit:
                continue
            _check_dummy(subject, seq_len, number, most)
            asked += 1
    if not asked:
        raise subject.blame(
            "max_tokens",
            f"less than max_model_len, which is {ctx.max_model_len}",
            str(most),
            "a model whose images don't fit it can't be served",
        )
    return f"long enough, each image takes {most} tokens"


def _check_dummy(subject: Subject, seq_len: int, number: int, most: int) -> None:
    asked = f"dummy_data(ctx, {seq_len}, {{'image': {number}}})"
    dummy = subject.plugin.dummy_data(subject.ctx, seq_len, {"image": number} if number else {})
    hint = "dummy_prompt makes it of the costliest size; give it that size"
    if dummy.mapped or dummy.placeholders:
        raise subject.blame("dummy_data", f"a raw prompt from {asked}", "one already processed")
    try:
        prepared = subject.pipeline.prepare(dummy)
    except RequestError as error:
        raise subject.blame(
            "dummy_data", f"a prompt that is taken from {asked}", f"refused: {error}", hint
        ) from error
    num_tokens = len(prepared.prompt_token_ids)
    if len(prepared.items) != number:
        expected, got = f"{number} images from {asked}", str(len(prepared.items))
        raise subject.blame("dummy_data", expected, got, hint)
    for item in prepared.items:
        if item.placeholder.length != most:
            raise subject.blame(
                "dummy_data",
                f"images that take {most} tokens each (what max_tokens says)",
                f"one that takes {item.placeholder.length}",
                hint,
            )
    if not seq_len <= num_tokens <= subject.ctx.max_model_len:
        raise subject.blame(
            "dummy_data",
            f"{seq_len} to {subject.ctx.max_model_len} tokens from {asked}",
            str(num_tokens),
            "fill up with text: seq_len less the tokens that the images take once expanded",
        )
