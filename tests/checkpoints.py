"""Small random-weight checkpoints, made with transformers from a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from backbones import other_config

CORPUS = [
    "USER: What is in the picture? ASSISTANT: a small red circle and a large blue square.",
    "How many objects are there? Describe the image. Is the star left of the ring? yes no",
    "The quick brown fox jumps over the lazy dog, 0123456789 times; naïve café, 你好, 🙂.",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
VOCAB_SIZE = 384
IMAGE_SIZE, PATCH_SIZE = 32, 8
BACKBONES = ("llama", "mistral", "qwen2")
TOWERS = ("clip", "siglip")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that can write any text."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return wrap_tokenizer(tokenizer)


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """`tokenizer` as transformers loads it, with `<s>` first, special tokens and a template."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=CHAT_TEMPLATE,
    )


def text_config(backbone: str, **changes: Any) -> Any:
    """A two-layer text backbone with grouped heads."""
    common: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    if backbone == "llama":
        return LlamaConfig(**{**common, **changes})
    if backbone == "mistral":
        return MistralConfig(**{**common, "sliding_window": 24, "head_dim": 24, **changes})
    if backbone == "qwen2":
        return Qwen2Config(**{**common, "tie_word_embeddings": True, **changes})
    return other_config(backbone, common, changes)


def vision_config(tower: str, **changes: Any) -> Any:
    """A three-layer tower of 4 × 4 patches."""
    common: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        **changes,
    }
    return CLIPVisionConfig(**common) if tower == "clip" else SiglipVisionConfig(**common)


def make_llava(
    path: Path,
    *,
    backbone: str = "llama",
    tower: str = "clip",
    feature_layer: int | list[int] = -2,
    strategy: str = "default",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    text_changes: dict[str, Any] | None = None,
) -> Path:
    """Write a LLaVA-1.5 checkpoint with random weights to `path`, as transformers saves it."""
    text = text_config(backbone, **(text_changes or {}))
    config = LlavaConfig(
        vision_config=vision_config(tower),
        text_config=text,
        image_token_index=SPECIAL.index("<image>"),
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    save_random(LlavaForConditionalGeneration, config, path, dtype, seed)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size).save_pretrained(path)
    return path


def make_llava_next(
    path: Path,
    *,
    backbone: str = "llama",
    tower: str = "clip",
    pinpoints: list[list[int]] | None = None,
    feature_layer: int | list[int] = -2,
    strategy: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    text_changes: dict[str, Any] | None = None,
    vision_changes: dict[str, Any] | None = None,
) -> Path:
    """Write a LLaVA-NeXT checkpoint with random weights to `path`, as transformers saves it.

    Pinpoints are by default shaped as the published ones: 1 x 2, 2 x 1, 2 x 2, 3 x 1, 1 x 3 tiles.
    """
    text = text_config(backbone, **{"max_position_embeddings": 16384, **(text_changes or {})})
    vision = vision_config(tower, **(vision_changes or {}))
    side: int = vision.image_size
    if pinpoints is None:
        grids = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
        pinpoints = [[rows * side, columns * side] for rows, columns in grids]
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=SPECIAL.index("<image>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=strategy or ("default" if tower == "clip" else "full"),
        tie_word_embeddings=text.tie_word_embeddings,
    )
    save_random(LlavaNextForConditionalGeneration, config, path, dtype, seed)
    LlavaNextImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=pinpoints,
    ).save_pretrained(path)
    return path


def save_random(
    model_class: type[PreTrainedModel], config: Any, path: Path, dtype: torch.dtype, seed: int
) -> None:
    """Write a model with random weights, wide enough that greedy answers vary, and a tokenizer."""
    torch.manual_seed(seed)
    model: Any = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15 if "embed" in name else 0.12)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.05)
    model.generation_config.eos_token_id = 2
    model.to(dtype).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
