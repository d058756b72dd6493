"""transformers' attention calls, answered by us: read once, then sent to the paged cache.

transformers' modules look up their attention by name. Ours is registered once and hands each call
to whichever `Answer` is in force: one that reads what the layers ask for, one that keeps tokens
apart, or the paged cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from mm_engine.attention.backend import Attention
from mm_engine.attention.metadata import AttentionMetadata
from mm_engine.errors import MMEngineError, StartupError
from mm_engine.models.weights import does_not_fit

#: The name under which transformers' models find us. No masks are made for it: transformers would
#: look at the positions of every step for them, and wait for the device.
IMPLEMENTATION = "mm_engine_paged"
#: The same attention, which gets each mask as a `Mask`: for `read_layers`.
READING = "mm_engine_reading"
#: The attribute of transformers' attention modules that holds our layer.
LAYER = "mm_engine_attention"

#: Keywords that the paged cache honours, and those that change nothing about an answer: where the
#: tokens are (transformers' modules have used it by then) and what is to be returned beside it.
HONOURED = ("scaling", "sliding_window", "softcap", "is_causal")
HARMLESS = ("position_ids", "cache_position", "use_cache", "layer_idx")

OWN_MASK = "an attention mask or bias of the model's own making"

#: Takes (module, query `[1, H, T, D]`, key and value `[1, K, T, D]`, mask, keywords) and returns
#: `[1, T, H, D]`, as transformers' attention functions do.
Answer = Callable[[nn.Module, Tensor, Tensor, Tensor, Any, Mapping[str, Any]], Tensor]


class Unsupported(Exception):
    """What a backbone asks for and nothing here computes; the message says what, `remedy` more."""

    def __init__(
        self, reason: str, remedy: str = "Use a checkpoint with another text backbone."
    ) -> None:
        super().__init__(reason)
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Mask:
    """A mask as transformers describes it: may the query at one place see the key at another?"""

    sees: Callable[..., Tensor]

    def window(self, max_len: int) -> int | None:
        """The sliding window that this mask means for sequences up to `max_len` tokens.

        None: every token sees all before it. As in transformers, a token counts in its window.

        Raises:
            Unsupported: it is no causal mask, with or without a window.
        """
        zero, places = torch.tensor(0), torch.arange(max_len)
        row = self.sees(zero, zero, torch.tensor(max_len - 1), places).expand(max_len)
        window = int(row.sum())
        # Places at which masks of other kinds (chunks, two directions) differ from windows.
        for place in {0, 1, 2, 3, window - 1, window, window + 1, max_len // 2, max_len - 2}:
            if 0 <= place < max_len:
                row = self.sees(zero, zero, torch.tensor(place), places).expand(max_len)
                if not torch.equal(row, (places <= place) & (places > place - window)):
                    raise Unsupported("an attention mask that is neither causal nor a window")
        return None if window >= max_len else window


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one attention module asks for, as its call said."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    window: int | None  # as passed to the call; the mask decides
    softcap: float | None


_in_force: ContextVar[Answer] = ContextVar("mm_engine_attention")


@contextmanager
def answering(answer: Answer) -> Iterator[None]:
    """While this lasts, `answer` is the attention of transformers' modules."""
    token = _in_force.set(answer)
    try:
        yield
    finally:
        _in_force.reset(token)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **keywords: Any,
) -> tuple[Tensor, None]:
    answer = _in_force.get()(module, query, key, value, attention_mask, keywords)
    return answer.contiguous(), None


def _mask(*, mask_function: Callable[..., Tensor], **_: Any) -> Mask:
    return Mask(mask_function)


AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionInterface.register(READING, _attend)
AttentionMaskInterface.register(READING, _mask)


def read_call(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, keywords: Any
) -> LayerSpec:
    """What a call asks for.

    Raises:
        Unsupported: it is something else than causal attention of the step's tokens to their own
            sequences, or a keyword means something that nothing here computes.
    """
    if query.shape[2] != key.shape[2] or key.shape[:3] != value.shape[:3]:
        raise Unsupported("attention to other keys than the tokens' own")
    if query.shape[1] % key.shape[1] or value.shape[3] > key.shape[3]:
        raise Unsupported("heads of shapes that the cache doesn't hold")
    if mask is not None and not isinstance(mask, Mask):
        raise Unsupported(OWN_MASK)
    is_causal = keywords.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if mask is None and not is_causal:
        raise Unsupported("attention that isn't causal")
    for name, given in keywords.items():
        # `is` and a type, not `==`: a tensor has no one truth.
        off = given is None or given is False or (name == "dropout" and given == 0.0)
        if not off and name not in HONOURED and name not in HARMLESS:
            raise Unsupported(f"attention with {name}")
    scale = keywords.get("scaling")
    return LayerSpec(
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_dim=query.shape[3],
        value_dim=value.shape[3],
        scale=query.shape[3] ** -0.5 if scale is None else float(scale),
        window=keywords.get("sliding_window"),
        softcap=keywords.get("softcap"),
    )


def tokens_apart(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, keywords: Any
) -> Tensor:
    """An answer in which each token sees itself only, in place of attention.

    It depends on the whole of a token's query, key and value, so that whatever else mixes into
    these shows: each query head's value, and beside it the means of query and key.
    """
    repeats = query.shape[1] // key.shape[1]
    own = (value + key.mean(-1, keepdim=True)).repeat_interleave(repeats, dim=1)
    return (own + query.mean(-1, keepdim=True)).transpose(1, 2)


class PagedAttention(Attention):
    """One module's place in the paged cache, and what the module asked for when it was read."""

    def __init__(self, spec: LayerSpec, window: int | None) -> None:
        super().__init__(
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            scale=spec.scale,
            sliding_window=window,
            softcap=spec.softcap,
        )
        self.spec = spec


def paged(metadata: AttentionMetadata) -> Answer:
    """The answer that stores this step's keys and values and attends to the cache."""

    def answer(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, keywords: Any
    ) -> Tensor:
        layer = getattr(module, LAYER, None)
        spec = read_call(module, query, key, value, mask, keywords)
        if not isinstance(layer, PagedAttention) or layer.spec != spec:
            known = layer.spec if isinstance(layer, PagedAttention) else "no attention"
            raise StartupError(
                f"attention of {type(module).__name__} isn't what it was when the model was "
                f"built: {spec} instead of {known}. The text backbone can't be served."
            )
        if spec.value_dim < spec.head_dim:  # a cache has one size for keys and values
            value = nn.functional.pad(value, (0, spec.head_dim - spec.value_dim))
        # [1, heads, T, D] to [T, heads, D] and back.
        rows = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        attended: Tensor = layer(*rows, metadata)
        return attended.unsqueeze(0)[..., : spec.value_dim]

    return answer


def read_layers(run: Callable[[], object], max_len: int) -> list[tuple[nn.Module, PagedAttention]]:
    """Run a model once and make a layer for each module that called attention.

    Raises:
        Unsupported: a call asks for what isn't computed, or a module calls more than once.
    """
    layers: dict[int, tuple[nn.Module, PagedAttention]] = {}
    windows: dict[Mask, int | None] = {}  # most layers share a mask

    def answer(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, keywords: Any
    ) -> Tensor:
        spec = read_call(module, query, key, value, mask, keywords)
        if isinstance(mask, Mask) and mask not in windows:
            windows[mask] = mask.window(max_len)
        window = windows[mask] if isinstance(mask, Mask) else None
        # By default transformers follows the mask; only some kernels read the keyword.
        if spec.window is not None and min(spec.window, max_len) != (window or max_len):
            raise Unsupported(f"a sliding window of {spec.window} beside a mask of {window}")
        if id(module) in layers:
            raise Unsupported("a layer that attends more than once")
        layers[id(module)] = (module, PagedAttention(spec, window))
        return tokens_apart(module, query, key, value, mask, keywords)

    with answering(answer), torch.no_grad(), foreign_code():
        run()
    return list(layers.values())


@contextmanager
def foreign_code() -> Iterator[None]:
    """Turn whatever transformers' code raises, away from its usual path, into `Unsupported`."""
    try:
        yield
    except (Unsupported, MMEngineError):
        raise
    except Exception as error:
        if does_not_fit(error):  # the loader says so
            raise
        if isinstance(getattr(error, "obj", None), Mask):  # code that takes it for a tensor
            raise Unsupported(OWN_MASK) from error
        text = " ".join(str(error).split())
        raise Unsupported(f"its code raised {type(error).__name__}: {text}") from error
