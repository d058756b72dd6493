"""What is asked of the engines, and the least that each row could take on a measured machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from checkpoint import IMAGE_TOKEN, TEXT_SIZES, VISION_SIZES
from gpu_sections.shapes import TINY, Scale, decode_bytes, decoder_flops, tower_flops

#: Bits that a weight takes at least: groups of 32 with a scale of 16 bits.
QUANTIZED_BITS = {"int8": 8.5, "int4": 4.5}
QUANTIZATION_OF_LLAMA_CPP = {"int8": "q8_0", "int4": "q4_0"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """All lengths in tokens, prompts and answers."""

    scale: Scale
    prompt: int = 128  # of decodes and launches
    decodes: Sequence[int] = (1, 8, 32)  # sequences
    num_decoded: int = 33  # the first comes with the prompt
    image_text: int = 41  # beside the image, BOS included
    prefill: int = 512
    num_requests: int = 16
    request_text: int = 32
    request_answer: int = 64
    contexts: Sequence[int] = (128, 512, 1024, 2048, 3072, 4096)  # a prompt with its answer
    kv_tokens: int = 12288  # of every engine's cache
    max_model_len: int = 4096
    error_prompt: int = 33  # of what logits are compared after
    read_bytes: int = 1 << 30
    rounds: int = 5

    @property
    def kv_bytes(self) -> int:
        """Of the cache."""
        return self.kv_tokens * self.scale.kv_bytes_per_token

    @property
    def text_ids(self) -> list[int]:
        """The longest text prompt; others are its beginnings."""
        return text_ids(max(self.prompt, self.prefill, *self.contexts))

    def image_ids(self, num_text: int) -> list[int]:
        """A prompt of one image and `num_text` tokens of text, BOS included."""
        return [1, IMAGE_TOKEN, *text_ids(num_text)[1:]]

    @property
    def error_prompts(self) -> list[list[int]]:
        """Some texts of few tokens, which begin in different ways."""
        return [[1, *text_ids(self.error_prompt + i)[i + 1 :]] for i in range(8)]

    @property
    def products(self) -> list[list[int]]:
        """The (m, k, n) that the matrix rate is the best of."""
        hidden, inner = self.scale.text["hidden_size"], self.scale.text["intermediate_size"]
        vision = self.scale.vision
        rows, square = self.prefill, self.scale.square
        return [
            [rows, hidden, 2 * inner],
            [rows, vision["hidden_size"], vision["intermediate_size"]],
            [square, square, square],
        ]


def full(dtype: str) -> Sizes:
    """The 0.5B shape."""
    return Sizes(
        scale=Scale(text=TEXT_SIZES, vision=VISION_SIZES, dtype=dtype, square=1536, heads={})
    )


def quick(dtype: str) -> Sizes:
    """Small shapes, to try the script itself."""
    text = {**TINY.text, "hidden_size": 64, "intermediate_size": 96}  # groups of 32 fit
    vision, image_size = TINY.vision, TINY.image_size
    return Sizes(
        scale=Scale(
            text=text, vision=vision, image_size=image_size, dtype=dtype, square=64, heads={}
        ),
        prompt=16,
        decodes=(1, 3),
        num_decoded=5,
        image_text=9,
        prefill=24,
        num_requests=2,
        request_text=4,
        request_answer=4,
        contexts=(16, 48, 256),
        kv_tokens=1024,
        max_model_len=256,
        read_bytes=1 << 22,
        rounds=1,
    )


def text_ids(num_tokens: int) -> list[int]:
    """BOS and arbitrary byte tokens."""
    return [1, *(10 + i * 7 % 200 for i in range(num_tokens - 1))]


@dataclass(frozen=True, slots=True)
class Floors:
    """What the machine did at best in this run, and so the least that rows could take."""

    bytes_per_second: float
    flops_per_second: float
    import_torch_seconds: float
    sizes: Sizes

    def step_seconds(self, contexts: Sequence[int], bits: float | None = None) -> float:
        """A decode step of sequences that attend to so many tokens each.

        Weights and cache are read once, or the products take longer than that. `bits` are those of
        a quantised weight.
        """
        scale = self.sizes.scale
        num_bytes: float = decode_bytes(scale, contexts)
        if bits is not None:
            weights = decode_bytes(scale, [])
            num_bytes += weights * (bits / 8 / scale.item_size - 1)
        flops = decoder_flops(scale, [1] * len(contexts))
        return max(num_bytes / self.bytes_per_second, flops / self.flops_per_second)

    def prompt_seconds(self, lens: Sequence[int], num_images: int) -> float:
        """Prompts of so many tokens, and their images, at the matrix rate."""
        scale = self.sizes.scale
        flops = decoder_flops(scale, lens) + tower_flops(scale, num_images)
        return flops / self.flops_per_second

    def requests_seconds(self) -> float:
        """All image requests, their prompts and then their steps."""
        sizes = self.sizes
        count = sizes.num_requests
        prompt = sizes.scale.num_patches + sizes.request_text
        steps = sum(self.step_seconds([prompt + i] * count) for i in range(1, sizes.request_answer))
        return self.prompt_seconds([prompt] * count, count) + steps

    @property
    def kv_seconds_per_token(self) -> float:
        """What one more token of context adds to a step of one sequence."""
        return self.sizes.scale.kv_bytes_per_token / self.bytes_per_second

    def to_json(self) -> dict[str, Any]:
        """The three rates."""
        names = ("bytes_per_second", "flops_per_second", "import_torch_seconds")
        return {name: getattr(self, name) for name in names}


#: What a row is held against, with the least ratio that is wanted of this
#: engine: `floor` is the share of the floor that is reached, an engine's name how many times
#: better than it.
TARGETS: Mapping[str, Mapping[str, float]] = {
    "decode 1": {"floor": 0.9, "vLLM": 1.7, "llama.cpp": 1.0},
    "decode 8": {"floor": 0.75, "vLLM": 1.4, "llama.cpp": 1.5},
    "decode 32": {"floor": 0.8, "vLLM": 1.05},
    "image": {"vLLM": 1 / 0.95},
    "prefill": {"vLLM": 1.0},
    "requests": {"vLLM": 1 / 0.9},
    "int8": {"llama.cpp": 1.1},
    "int4": {"llama.cpp": 1.15},
    "int8 error": {"llama.cpp": 1.0},
    "int4 error": {"llama.cpp": 1.0},
}
LAUNCH_SECONDS = 6.0  # to the first token, at most
MEMORY_SHARE, MEMORY_REST = 1.15, 300e6  # of weights and cache, and bytes on top, at most
