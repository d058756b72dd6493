"""What `embed_images` returns, held to the contract for images of several sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm_engine.errors import RequestError
from mm_engine.plugins.blame import kind_of
from mm_engine.testing.checks_inputs import usual_sizes
from mm_engine.testing.registry import check
from mm_engine.testing.sizes import picture

if TYPE_CHECKING:
    from mm_engine.testing.subject import Subject

METHOD = "embed_images"


@check("encoder-output")
def encoder_output(subject: Subject) -> str:
    """One tensor of `[num_tokens, hidden]` for each image, finite, of the model's dtype."""
    hidden = int(subject.ctx.text_config.hidden_size)
    items = []
    for size in usual_sizes(subject):
        try:
            items.append((f"an image of {size[0]}x{size[1]} pixels", subject.map(picture(size))))
        except RequestError:  # the plugin doesn't take this shape
            continue
    before = [{name: tensor.clone() for name, tensor in item.items()} for _, item in items]
    for what, item in items:
        _check_rows(subject, subject.embed([item])[0], what, hidden, torch.float32)
    # Together, for tensors of unequal shapes come as a list of the mapper's own.
    for (what, _), rows in zip(items, subject.embed([item for _, item in items]), strict=True):
        _check_rows(subject, rows, f"{what} among others", hidden, torch.float32)
    for (what, item), kept in zip(items, before, strict=True):
        changed = [name for name, tensor in item.items() if not torch.equal(tensor, kept[name])]
        if changed:
            raise subject.blame(
                METHOD,
                "the mapper's tensors unchanged",
                f"{changed[0]} of {what} written to",
                "operations that end in _ and += write in place; an image may be encoded again",
            )
    # In float32 a plugin that asks for float32 by name looks right.
    low = subject.model_in(torch.bfloat16)
    (rows,) = subject.embed([items[0][1]], low)
    _check_rows(subject, rows, items[0][0], hidden, torch.bfloat16)
    return f"[num_tokens, {hidden}], float32 and bfloat16 as the model is"


def _check_rows(subject: Subject, rows: object, what: str, hidden: int, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    if not isinstance(rows, Tensor) or rows.ndim != 2 or rows.shape[1] != hidden:
        raise subject.blame(
            METHOD,
            f"a tensor [num_tokens, {hidden}] for {what}",
            kind_of(rows),
            "a list with one tensor for each image, of the text backbone's hidden size",
        )
    if rows.dtype != dtype:
        raise subject.blame(
            METHOD,
            f"{name} rows from a {name} model",
            str(rows.dtype).removeprefix("torch."),
            "a conversion to a fixed dtype: .float(), .half(), .to(torch.float32)",
        )
    if rows.device.type != "cpu":
        raise subject.blame(METHOD, "rows on the model's device, cpu", str(rows.device))
    if not bool(torch.isfinite(rows).all()):
        raise subject.blame(METHOD, f"finite numbers for {what}", "NaN or infinity")
