"""The model beside transformers', stage by stage, for one image or one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from mm_engine.errors import PluginError
from mm_engine.testing.compare import difference
from mm_engine.testing.oracle import ModuleCall, Oracle, recorded

if TYPE_CHECKING:
    from mm_engine.testing.subject import Subject


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage for one image: what differs, or why it couldn't be compared."""

    gap: str | None = None  # how it differs; None: it doesn't
    skipped: str | None = None  # why there is nothing to compare
    hint: str = ""
    what: str = ""  # which tensor
    error: PluginError | None = None  # what kept the plugin's from being made


@dataclass(frozen=True, slots=True)
class ImageParity:
    """An image's way to the text backbone: the stages up to its rows."""

    size: tuple[int, int]
    pixels: Stage
    tower: Stage
    projector: Stage
    rows: Stage


def image_parity(subject: Subject, oracle: Oracle, image: Image.Image) -> ImageParity:
    """Compare every stage of one image.

    Raises:
        Refused: transformers doesn't take it.
    """
    tensors = subject.map(image)
    theirs, calls = oracle.calls(image)
    pairs = {call.name: counterpart(subject.model, oracle, call.name) for call in calls}
    found = {name: module for name, module in pairs.items() if module is not None}
    with recorded(found) as ours:
        try:
            (rows,) = subject.embed([tensors])
            (ids,) = subject.ranges([image], [tensors])
            stage = _rows(theirs, rows, _text_of(subject, ids))
        except PluginError as error:  # the stages before may say why
            stage = Stage("none", what="rows of get_image_features", error=error)
    return ImageParity(
        image.size,
        _pixels(tensors, oracle.mapped([image])),
        _tower(oracle, calls, ours),
        _projector(calls, ours),
        stage,
    )


def counterpart(model: nn.Module, oracle: Oracle, name: str) -> nn.Module | None:
    """The plugin's module for one of transformers': of the same name, or with the same weights."""
    modules = dict(model.named_modules())
    if name in modules:
        return modules[name]
    wanted = list(oracle.base.get_submodule(name).parameters())
    if not wanted:
        return None
    largest = max(wanted, key=lambda parameter: parameter.numel())
    local = next(n for n, p in oracle.base.get_submodule(name).named_parameters() if p is largest)
    for path, _ in model.named_parameters():
        parameter = model.get_parameter(path)  # the plain weight of a packed one too
        same = parameter.shape == largest.shape and torch.equal(parameter, largest)
        if same and path.endswith(f".{local}"):
            return modules[path.removesuffix(f".{local}")]
    return None


def _pixels(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Stage:
    shared = [name for name in theirs if name in ours]
    if not shared:
        return Stage(skipped=f"no tensor of the mapper is named as one of {sorted(theirs)}")
    for name in shared:
        wanted, got = theirs[name], ours[name]
        if wanted.ndim > got.ndim and len(wanted) == 1:  # a batch of one; tiles stay as they are
            wanted = wanted[0]
        if wanted.shape != got.shape:
            gap = f"shape {list(got.shape)} instead of {list(wanted.shape)}"
        elif wanted.is_floating_point():
            gap = difference(wanted.reshape(1, -1), got.reshape(1, -1)) or ""
        else:
            equal = torch.equal(wanted, got.to(wanted.dtype))
            few = wanted.numel() <= 8
            gap = f"{got.tolist()} instead of {wanted.tolist()}" if few else "other numbers"
            gap = "" if equal else gap
        if gap:
            hint = "sizes are (height, width) there" if not wanted.is_floating_point() else ""
            return Stage(gap, what=name, hint=hint or "resampling, mean and std, order of channels")
    return Stage(what=", ".join(shared))


def _last(calls: list[ModuleCall]) -> ModuleCall | None:
    """The projector: the last part that is called, if the tower is another one."""
    return calls[-1] if len(calls) > 1 else None


def _tower(oracle: Oracle, calls: list[ModuleCall], ours: Mapping[str, ModuleCall]) -> Stage:
    last = _last(calls)
    if last is None:
        return Stage(skipped="transformers has no projector apart from the tower")
    if last.name not in ours or not ours[last.name].inputs:
        return Stage(skipped=f"the model has no module like transformers' {last.name}")
    expected, got = _joined(last.inputs), _joined(ours[last.name].inputs)
    gap = difference(expected, got)
    what = f"input of {last.name}"
    if gap is None:
        return Stage(what=what)
    return Stage(gap, what=what, hint=_explain_tower(oracle, calls[0], expected, got))


def _explain_tower(oracle: Oracle, tower: ModuleCall, expected: Tensor, got: Tensor) -> str:
    """Say which hidden states of transformers' tower the features are, if they are any."""
    args, kwargs = tower.arguments[0]
    try:
        with torch.inference_mode():
            out: Any = getattr(oracle.base, tower.name)(
                *args, **{**kwargs, "output_hidden_states": True}
            )
        states = list(out.hidden_states)
    except Exception:  # a tower without hidden states: nothing to explain with
        states = []
    right, wrong = _state_of(states, expected), _state_of(states, got)
    if right is None or wrong is None:
        return "the tower: its weights, its input's layout, the layer and the rows that are taken"
    parts = []
    if right[0] != wrong[0]:
        parts.append(
            f"the layer given to build_vision_tower: these are hidden state {wrong[0]} of "
            f"{len(states) - 1}, transformers takes {right[0]}"
        )
    if right[1] != wrong[1]:
        parts.append(f"{wrong[1]}, where transformers takes {right[1]}")
    return "; ".join(parts)


def _state_of(states: list[Tensor], features: Tensor) -> tuple[int, str] | None:
    """Which hidden state `features` are, and which rows of it."""
    for index, state in enumerate(states):
        parts = {
            "all rows": state,
            "all rows but the first (the class token)": state[:, 1:],
            "all rows but the last": state[:, :-1],
        }
        for name, part in parts.items():
            if state.ndim == 3 and difference(part, features) is None:
                return index, name
    return None


def _projector(calls: list[ModuleCall], ours: Mapping[str, ModuleCall]) -> Stage:
    last = _last(calls)
    if last is None:
        return Stage(skipped="transformers has no projector apart from the tower")
    if last.name not in ours or not ours[last.name].outputs:
        return Stage(skipped=f"the model has no module like transformers' {last.name}")
    gap = difference(_joined(last.outputs), _joined(ours[last.name].outputs))
    hint = "the projector: activation, biases, norms, the order of its layers"
    return Stage(gap, what=f"output of {last.name}", hint=hint)


def _joined(tensors: list[Tensor]) -> Tensor:
    """One tensor of a module's calls: as it is, or their rows one after another."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat([tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors])


def _text_of(subject: Subject, ids: tuple[int, ...]) -> dict[int, Tensor]:
    """`[hidden]` of each text token in an image's range, by its position there."""
    positions = subject.text_in(ids)
    if not positions:
        return {}
    with torch.inference_mode():
        rows: Tensor = subject.model.embed_tokens(torch.tensor([ids[p] for p in positions]))
    return dict(zip(positions, rows, strict=True))


def _rows(expected: Tensor, got: Tensor, text: Mapping[int, Tensor]) -> Stage:
    """Compare an image's rows: transformers' in order, and between them those of `text`."""
    if text and len(got) == len(expected) + len(text):
        images = iter(expected)
        pieces = [text[p] if p in text else next(images) for p in range(len(got))]
        expected = torch.stack(pieces)
        gap = difference(torch.stack(list(text.values())), got[list(text)])
        if gap is not None:
            hint = "rows of text in an image's range are self.embed_tokens of their ids"
            return Stage(gap, what="embeddings of the text among an image's rows", hint=hint)
    hint = "what becomes of the projector's rows: order of tiles, padding cut off, newlines"
    gap = difference(expected, got)
    if gap is not None and len(expected) != len(got):
        same = 0
        for first, second in zip(expected, got, strict=False):
            if difference(first, second) is not None:
                break
            same += 1
        gap += f"; the first {same} rows agree"
    return Stage(gap, what="rows of get_image_features", hint=hint)
