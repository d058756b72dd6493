"""What was asked: a prompt on its way through the hooks, and the immutable request it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mm_engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class PlaceholderRange:
    """Where one item's embeddings go: `length` tokens from `offset` in the prompt's ids."""

    modality: str  # "image"
    item: int  # index among the items of this modality, in prompt order
    offset: int  # of the first placeholder token, in the expanded ids
    length: int  # placeholder tokens; `embed_images` gives as many rows for the item

    @property
    def end(self) -> int:
        """The first position after the range."""
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class PromptInputs:
    """One prompt as the hooks see it. Frozen: a hook returns a new one (`dataclasses.replace`).

    `dummy_data` returns it raw (text or ids, and items as a user would send them); the
    `input_processor` gets ids with **one placeholder token per item** and the mapped tensors, and
    returns ids with every placeholder expanded and `placeholders` filled in.
    """

    prompt: str | None = None  # raw text; each item's placeholder text stands where it goes
    prompt_token_ids: tuple[int, ...] | None = None
    #: Modality -> its items: {"image": (PIL images,)}. What the input_processor gets is RGB.
    multi_modal_data: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    #: Modality -> what the mapper made of each item: {"image": ({"pixel_values": tensor},)}.
    mapped: Mapping[str, tuple[Mapping[str, Tensor], ...]] = field(default_factory=dict)
    placeholders: tuple[PlaceholderRange, ...] = ()  # in order of offset, apart from each other


@dataclass(frozen=True, slots=True)
class Item:
    """One item (an image) of a request, mapped to tensors and placed in the prompt.

    `content_key` is the SHA-256 (hex) of the item's content and of all that decides its features.
    """

    placeholder: PlaceholderRange
    content_key: str
    tensors: Mapping[str, Tensor]  # the keywords of the model's `embed_<modality>s`

    @property
    def modality(self) -> str:
        """The kind of item: `image`."""
        return self.placeholder.modality


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked, complete and immutable: the engine needs nothing else to answer it."""

    request_id: str
    prompt_token_ids: tuple[int, ...]  # placeholders expanded
    sampling_params: SamplingParams  # max_tokens is set
    items: tuple[Item, ...] = ()  # in order of offset
    eos_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""  # nothing is shared between requests of different salts
    priority: int = 0  # lower goes first; equal ones in order of arrival
    #: What `sampling_params.structured_outputs` was compiled to; see worker/grammars.py.
    grammar: bytes | None = None
