"""The shapes that are measured, and what they cost at least: bytes and FLOPs by formula.

A multiplication and an addition are two FLOPs, as in arXiv:2001.08361 (2.1), on which these
counts are built: a product of `[m, k]` by `[k, n]` is `2 m k n`. Norms, rotations, activations and
softmax are left out, as there. A query that attends to c tokens takes `2 c D` for the scores of a
head of size D and as many for the sum of values: `4 c H D` for H heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from checkpoint import VISION_SIZES, VOCAB_SIZE

PATCH = 14


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """All sizes of a run."""

    text: Mapping[str, int]
    vision: Mapping[str, int]
    image_size: int = 336
    dtype: str = "bfloat16"
    batches: Sequence[int] = (1, 8, 64)  # of decode
    context: int = 640  # tokens before the first decode step
    num_steps: int = 30  # of a round of decodes
    num_prefills: int = 16  # of images and 64 tokens of text
    num_text: int = 64
    num_requests: int = 64  # at once
    outputs: tuple[int, int] = (32, 160)  # tokens of an answer, from and to
    texts: tuple[int, int] = (16, 112)  # and of a question
    square: int = 8192  # rows and columns of the big matrices
    copy_bytes: int = 4 * 2**30
    heads: Mapping[str, tuple[int, int, int]]  # attention's: query, key/value, size
    contexts: Sequence[int] = (700, 4096)  # of attention
    num_rows: int = 10240  # of the small kernels
    num_logits: int = VOCAB_SIZE  # of a row that is sampled from

    @property
    def num_patches(self) -> int:
        """Tokens of one image."""
        return (self.image_size // PATCH) ** 2

    @property
    def head_size(self) -> int:
        """Of the decoder."""
        return self.text["hidden_size"] // self.text["num_attention_heads"]

    @property
    def item_size(self) -> int:
        """Bytes of a number."""
        return 4 if self.dtype == "float32" else 2

    @property
    def kv_bytes_per_token(self) -> int:
        """What one token takes in the KV cache: a key and a value in each layer."""
        size = self.text["num_key_value_heads"] * self.head_size * self.item_size
        return 2 * self.text["num_hidden_layers"] * size


FULL = Scale(
    text={
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    vision=VISION_SIZES,
    heads={"MHA": (32, 32, 128), "GQA": (32, 8, 128)},
)
TINY = Scale(
    text={
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    vision={
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "projection_dim": 16,
    },
    image_size=56,
    dtype="float32",
    batches=(1, 3),
    context=20,
    num_steps=2,
    num_prefills=2,
    num_text=4,
    num_requests=3,
    outputs=(2, 4),
    texts=(2, 6),
    square=32,
    copy_bytes=2**16,
    heads={"GQA": (2, 1, 16)},
    contexts=(20,),
    num_rows=8,
    num_logits=100,
)


def layer_products(text: Mapping[str, int], head_size: int) -> list[tuple[int, int]]:
    """The matrices of one decoder layer, as (in, out): QKV, output, gate and up, down."""
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
    return [
        (hidden, (heads + 2 * kv_heads) * head_size),
        (heads * head_size, hidden),
        (hidden, 2 * inner),
        (inner, hidden),
    ]


def decode_bytes(scale: Scale, contexts: Sequence[int]) -> int:
    """Bytes that one decode step reads at least: all weights once, and each sequence's KV cache.

    The embeddings aren't among the weights, of which a step reads a row for each sequence.
    `contexts` are the tokens that each sequence attends to, its newest one included.
    """
    text = scale.text
    numbers = sum(a * b for a, b in layer_products(text, scale.head_size))
    numbers = text["num_hidden_layers"] * (numbers + 2 * text["hidden_size"])  # and two norms
    numbers += (VOCAB_SIZE + 1) * text["hidden_size"]  # the head, and the norm before it
    return numbers * scale.item_size + sum(contexts) * scale.kv_bytes_per_token


def decoder_flops(scale: Scale, lens: Sequence[int]) -> int:
    """FLOPs of the decoder that reads prompts of these lengths whole, and samples behind each."""
    text = scale.text
    numbers = sum(a * b for a, b in layer_products(text, scale.head_size))
    layer = 2 * numbers * sum(lens) + attention_flops(
        text["num_attention_heads"], scale.head_size, lens
    )
    head = 2 * VOCAB_SIZE * text["hidden_size"] * len(lens)
    return text["num_hidden_layers"] * layer + head


def attention_flops(num_heads: int, head_size: int, lens: Sequence[int]) -> int:
    """FLOPs of causal attention over whole prompts: token i attends to i + 1 tokens."""
    return 4 * num_heads * head_size * sum(n * (n + 1) // 2 for n in lens)


def tower_flops(scale: Scale, num_images: int) -> int:
    """FLOPs of the vision tower and the projector.

    The tower is built up to its last layer but one, from which LLaVA reads features
    (arXiv:2310.03744), and has a class token; each row attends to all. The projector is two
    products, without the class token.
    """
    vision, hidden = scale.vision, scale.text["hidden_size"]
    width, patches = vision["hidden_size"], scale.num_patches
    rows = patches + 1
    embed = 2 * patches * 3 * PATCH**2 * width
    products = 2 * rows * (4 * width**2 + 2 * width * vision["intermediate_size"])
    layers = (vision["num_hidden_layers"] - 1) * (products + 4 * rows**2 * width)
    projector = 2 * patches * (width * hidden + hidden**2)
    return num_images * (embed + layers + projector)
