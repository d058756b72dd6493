"""What a plugin's encoder does wrong is blamed on it, and costs the items at fault only."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mm_engine.errors import PluginError
from mm_engine.plugins import hookimpl
from mm_engine.plugins.plugin import Plugin
from mm_engine.plugins.record import PluginRecord
from mm_engine.request import Item
from mm_engine.worker.encoder import Encoder
from sequences import make_item

ROWS, HIDDEN = 3, 4
BAD = -1.0  # the pixel of an item that the plugin below goes wrong on
CPU = torch.device("cpu")
Spoil = Callable[[list[Any], int], Any]


class Model(nn.Module):
    """Each feature is the item's pixel; `spoil(features, i)` breaks those of the bad item i."""

    def __init__(self, spoil: Spoil | None = None) -> None:
        super().__init__()
        self.spoil = spoil
        self.calls: list[int] = []  # items in each call

    def embed_images(self, *, pixel_values: Any) -> Any:
        self.calls.append(len(pixel_values))
        features: Any = [torch.full((ROWS, HIDDEN), float(p.flatten()[0])) for p in pixel_values]
        for i, pixels in enumerate(pixel_values):
            if self.spoil is not None and float(pixels.flatten()[0]) == BAD:
                features = self.spoil(features, i)
        return features


@pytest.fixture(scope="module")
def plugin() -> Plugin:
    """mm-faulty 0.1.0, whose model is the one above."""
    module: Any = ModuleType("mm_faulty")

    @hookimpl
    def model_class(ctx: Any) -> type[nn.Module]:
        return Model

    @hookimpl
    def max_tokens(ctx: Any, modality: str) -> int:
        return ROWS

    module.model_class, module.max_tokens = model_class, max_tokens
    plugin = Plugin(PluginRecord("mm-faulty", "0.1.0", "mm_faulty", "Any"), module)
    ctx: Any = None  # neither hook looks at it
    assert plugin.model_class(ctx) is Model
    return plugin


def image(value: float, *, size: int = 2, number: int = 0) -> Item:
    pixels = torch.full((3, size, size), value)
    return make_item(f"key-{value:g}", 0, ROWS, number, pixel_values=pixels)


def replaced(value: Callable[[Tensor], Any]) -> Spoil:
    """Put `value(features)` in the place of the bad item's."""
    return lambda features, i: [*features[:i], value(features[i]), *features[i + 1 :]]


def raising(features: list[Any], i: int) -> Any:
    raise ZeroDivisionError("no such patch")


VIOLATIONS: dict[str, tuple[Spoil, str]] = {
    "raises": (raising, r"raised ZeroDivisionError: no such patch"),
    "too-few-rows": (replaced(lambda x: x[1:]), r"shape \[3, 4\] for image 1 .*, got \[2, 4\]"),
    "too-narrow": (replaced(lambda x: x[:, 1:]), r"shape \[3, 4\] for image 1 .*, got \[3, 3\]"),
    "not-flat": (replaced(lambda x: x[None]), r"shape \[3, 4\] for image 1 .*, got \[1, 3, 4\]"),
    "integers": (replaced(lambda x: x.long()), r"dtype float32 for image 1, got int64"),
    "no-tensor": (replaced(lambda x: x.tolist()), r"expected a tensor for image 1, got list"),
    "nan": (replaced(lambda x: x * float("nan")), r"finite features for image 1, got NaN"),
    "infinite": (replaced(lambda x: x / 0.0), r"finite features for image 1, got NaN or inf"),
    "elsewhere": (replaced(lambda x: x.to("meta")), r"device cpu for image 1, got meta"),
    "one-short": (lambda features, i: features[:-1], r"expected 1 tensors.*, got 0 of them"),
    "one-more": (lambda features, i: [*features, features[0]], r"expected 1 tensors.*, got 2"),
    "nothing": (lambda features, i: None, r"expected 1 tensors.*, got None"),
    "a-mapping": (lambda features, i: dict(enumerate(features)), r"expected 1 tensors.*dict"),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_fails_the_item_at_fault_and_names_the_place(name: str, plugin: Plugin) -> None:
    spoil, fact = VIOLATIONS[name]
    encoder = Encoder(Model(spoil), plugin, HIDDEN, CPU)
    errors = encoder.encode([image(5.0), image(BAD, number=1), image(7.0, number=2)])
    assert list(errors) == ["key--1"]
    error = errors["key--1"]
    assert isinstance(error, PluginError)
    place = r"mm-faulty 0\.1\.0 · embed_images \(\S*test_encoder\.py:\d+\): "
    with pytest.raises(PluginError, match=place + ".*" + fact):
        raise error
    assert sorted(encoder.features) == ["key-5", "key-7"]
    for key, value in (("key-5", 5.0), ("key-7", 7.0)):
        assert torch.equal(encoder.features[key], torch.full((ROWS, HIDDEN), value))
    assert encoder.num_encoded == 2


def test_a_model_without_the_method_is_blamed(plugin: Plugin) -> None:
    errors = Encoder(nn.Identity(), plugin, HIDDEN, CPU).encode([image(5.0)])
    with pytest.raises(PluginError, match="mm-faulty 0.1.0 · embed_images .*AttributeError"):
        raise errors["key-5"]


def test_keywords_that_do_not_fit_are_blamed(plugin: Plugin) -> None:
    item = make_item("key", 0, ROWS, pixels=torch.zeros(3, 2, 2))
    errors = Encoder(Model(), plugin, HIDDEN, CPU).encode([item])
    with pytest.raises(PluginError, match="embed_images .*TypeError.*'pixels'"):
        raise errors["key"]


def test_items_are_encoded_together_and_only_once(plugin: Plugin) -> None:
    model = Model()
    encoder = Encoder(model, plugin, HIDDEN, CPU)
    assert encoder.encode([image(1.0), image(2.0)]) == {}
    assert encoder.encode([image(2.0), image(3.0)]) == {}
    assert encoder.encode([image(1.0)]) == {}
    assert model.calls == [2, 1]
    encoder.drop(["key-1", "never-seen"])
    assert sorted(encoder.features) == ["key-2", "key-3"]
    assert encoder.encode([image(1.0)]) == {}
    assert model.calls == [2, 1, 1]


def test_items_of_unequal_shape_arrive_as_a_list(plugin: Plugin) -> None:
    seen: list[Any] = []

    class Listening(Model):
        def embed_images(self, *, pixel_values: Any) -> Any:
            seen.append(pixel_values)
            return super().embed_images(pixel_values=pixel_values)

    encoder = Encoder(Listening(), plugin, HIDDEN, CPU)
    assert encoder.encode([image(1.0), image(2.0)]) == {}
    assert encoder.encode([image(3.0), image(4.0, size=5)]) == {}
    assert isinstance(seen[0], Tensor) and seen[0].shape == (2, 3, 2, 2)
    assert [tuple(t.shape) for t in seen[1]] == [(3, 2, 2), (3, 5, 5)]
    assert float(encoder.features["key-4"][0, 0]) == 4.0


def test_features_may_come_stacked_and_hold_no_more_memory_than_their_own(
    plugin: Plugin,
) -> None:
    class Stacking(Model):
        def embed_images(self, *, pixel_values: Any) -> Any:
            return torch.stack(super().embed_images(pixel_values=pixel_values))

    encoder = Encoder(Stacking(), plugin, HIDDEN, CPU)
    assert encoder.encode([image(1.0), image(2.0), image(3.0)]) == {}
    for value in (1.0, 2.0, 3.0):
        rows = encoder.features[f"key-{value:g}"]
        assert torch.equal(rows, torch.full((ROWS, HIDDEN), value))
        assert rows.untyped_storage().nbytes() == ROWS * HIDDEN * 4
