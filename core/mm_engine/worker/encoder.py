"""Running a plugin's `embed_images` and holding what it returns to the contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mm_engine.errors import MMEngineError
from mm_engine.models.weights import device_is_lost, does_not_fit
from mm_engine.plugins.blame import kind_of, may_be_the_users, one_line
from mm_engine.plugins.plugin import Plugin
from mm_engine.request import Item
from mm_engine.worker.sliced_call import SlicedCall
from mm_engine.worker.transfers import move


class Encoder:
    """Encodes items and keeps their features by content key until the engine says to drop them."""

    def __init__(
        self,
        model: Any,
        plugin: Plugin,
        hidden_size: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model = model
        self.dtype = dtype  # of the features
        self.plugin = plugin
        self.hidden_size = hidden_size
        self.device = device
        self.features: dict[str, Tensor] = {}  # content key -> [num_tokens, hidden]
        self.num_encoded = 0
        self._sliced: tuple[str, SlicedCall] | None = None  # what is encoded in slices
        self._failures: dict[str, BaseException] = {}  # of what was, until somebody needs it

    @property
    def bytes_per_row(self) -> int:
        """Memory that one token's features take."""
        return self.hidden_size * self.dtype.itemsize

    def drop(self, keys: Sequence[str]) -> None:
        """Forget the features of `keys`; what is encoded in part is not encoded to its end."""
        for key in keys:
            if self._sliced is not None and self._sliced[0] == key:
                self._sliced[1].cancel()
                _forget_frames(self._sliced[1].error)  # they refer to the call, as it to them
                self._sliced = None
            self.features.pop(key, None)
            self._failures.pop(key, None)

    def encode(self, items: Sequence[Item]) -> dict[str, MMEngineError]:
        """Encode `items` and keep their features; returns the errors of those that failed, by key.

        Items go to the plugin together. If that fails each goes alone, so that a bad one fails
        only the requests that hold it.
        """
        errors: dict[str, MMEngineError] = {}
        for item in items:
            self._finish_slices(item.content_key)
            error = self._failures.pop(item.content_key, None)
            if isinstance(error, MMEngineError):
                errors[item.content_key] = error
            elif error is not None:
                raise error
        done = self.features.keys() | errors.keys()
        todo = [item for item in items if item.content_key not in done]
        if not todo:
            return errors
        if self._sliced is not None:  # no model is asked for two things at once
            self._finish_slices(self._sliced[0])
        try:
            self._encode(todo)
            return errors
        except MMEngineError as error:
            if len(todo) == 1:
                return {**errors, todo[0].content_key: error}
        for item in todo:
            try:
                self._encode([item])
            except MMEngineError as error:
                errors[item.content_key] = error
        return errors

    def encode_slice(self, item: Item, seconds: float) -> None:
        """Go on to encode `item` for about `seconds`; one item at a time is encoded in slices.

        If it fails, the step that needs its features is told, by `encode`.
        """
        if self._sliced is not None and self._sliced[0] != item.content_key:
            self._finish_slices(self._sliced[0])  # left by a step that Ctrl-C cut short
        if self._sliced is None:
            if item.content_key in self.features or item.content_key in self._failures:
                return  # another step had to have it whole

            def call() -> None:
                with torch.inference_mode():
                    self._encode([item])

            try:
                self._sliced = item.content_key, SlicedCall(call, self._places_to_rest())
            except RuntimeError:  # no thread to be had: the step that needs it encodes it whole
                return
        self._sliced[1].run(seconds)
        self._collect()

    @property
    def slice_is_last(self) -> bool:
        """Whether nothing is encoded in part."""
        return self._sliced is None

    def _places_to_rest(self) -> list[nn.Module]:
        """The leaves of the model. Scripted ones take no hooks after they were compiled."""
        modules = [m for m in self.model.modules() if not isinstance(m, torch.jit.ScriptModule)]
        return [module for module in modules if not list(module.children())]

    def _finish_slices(self, key: str) -> None:
        if self._sliced is not None and self._sliced[0] == key:
            self._sliced[1].run()
            self._collect()

    def _collect(self) -> None:
        assert self._sliced is not None
        key, sliced = self._sliced
        if not sliced.ended:
            return
        self._sliced = None
        if sliced.error is not None:
            _forget_frames(sliced.error)
            self._failures[key] = sliced.error

    def _encode(self, items: Sequence[Item]) -> None:
        method = f"embed_{items[0].modality}s"
        tensors = {name: self._batch(name, items) for name in items[0].tensors}
        try:
            with torch.inference_mode():
                embed = getattr(self.model, method)
                features = self.plugin.observed(
                    method, embed, lambda: self._finished(embed(**tensors))
                )
        except BaseException as error:  # SystemExit too: a plugin doesn't end the engine
            if may_be_the_users(error) or does_not_fit(error) or device_is_lost(error):
                raise
            raise self.plugin.blame(method, f"raised {one_line(error)}", error) from error
        if isinstance(features, Tensor):
            features = list(features) if features.dim() == 3 else features
        if not isinstance(features, list | tuple) or len(features) != len(items):
            several = isinstance(features, list | tuple)
            got = f"{len(features)} of them" if several else kind_of(features)
            raise self.plugin.blame(
                method, f"expected {len(items)} tensors, one for each image, got {got}"
            )
        checked = [
            self._check(method, item, rows) for item, rows in zip(items, features, strict=True)
        ]
        # One question for all: each waits for the device.
        finite = torch.stack([rows.isfinite().all() for rows in checked]).tolist()
        if not all(finite):
            what = _name_of(items[finite.index(False)])
            raise self.plugin.blame(
                method, f"expected finite features for {what}, got NaN or infinity"
            )
        for item, rows in zip(items, checked, strict=True):
            # A copy: a view of the batch's features would keep all of them in memory, and what
            # a model returns it may write to again.
            self.features[item.content_key] = rows.clone()
        self.num_encoded += len(items)

    def _batch(self, name: str, items: Sequence[Item]) -> Tensor | list[Tensor]:
        """The items' tensors of one name, as copies: other requests may bring the same ones."""
        tensors = batch([item.tensors[name] for item in items])
        if isinstance(tensors, Tensor):  # stacked, so they are copies
            return move(tensors, self.device)
        return [move(tensor.clone(), self.device) for tensor in tensors]

    def _finished(self, features: Any) -> Any:
        """Wait for the device if the call is timed: launching work isn't doing it."""
        if self.plugin.observer is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return features

    def _check(self, method: str, item: Item, rows: Any) -> Tensor:
        wanted = [item.placeholder.length, self.hidden_size]
        what = _name_of(item)
        if not isinstance(rows, Tensor):
            raise self.plugin.blame(method, f"expected a tensor for {what}, got {kind_of(rows)}")
        if rows.layout != torch.strided:
            raise self.plugin.blame(
                method, f"expected a dense tensor for {what}, got layout {rows.layout}"
            )
        if list(rows.shape) != wanted:
            own = "input_processor" in self.plugin.hooks
            counted = f"{wanted[0]} placeholder tokens, by "
            counted += "input_processor" if own else "max_tokens"
            raise self.plugin.blame(
                method, f"expected shape {wanted} for {what} ({counted}), got {list(rows.shape)}"
            )
        if rows.dtype != self.dtype:
            expected, got = (str(d).removeprefix("torch.") for d in (self.dtype, rows.dtype))
            raise self.plugin.blame(method, f"expected dtype {expected} for {what}, got {got}")
        if rows.device.type != self.device.type:
            raise self.plugin.blame(
                method, f"expected device {self.device} for {what}, got {rows.device}"
            )
        return rows


def _name_of(item: Item) -> str:
    """As messages name it."""
    return f"{item.modality} {item.placeholder.item}"


def _forget_frames(error: BaseException | None) -> None:
    """Let go of the tensors in the frames of an exception and of its causes: it may be kept long.

    The message of a `PluginError` says where in the plugin it was raised.
    """
    while error is not None:  # an exception may be its own cause: no link is followed twice
        cause = error.__cause__ or error.__context__
        error.__traceback__ = error.__cause__ = error.__context__ = None
        error = cause


def batch(tensors: list[Tensor]) -> Tensor | list[Tensor]:
    """Tensors of one shape stacked `[N, ...]`, unequal ones as the list they are."""
    if all(tensor.shape == tensors[0].shape for tensor in tensors):
        return torch.stack(tensors)
    return tensors
