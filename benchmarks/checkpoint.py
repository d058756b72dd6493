"""The checkpoint that the benchmarks share: a 0.5B text backbone under a ViT-L tower, random."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 32064
NEW_NAME = re.compile(r"^vision_tower\.(?!vision_model\.)(.*)")
IMAGE_TOKEN = 32000
VISION_SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "projection_dim": 768,
}
TEXT_SIZES = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}


def make_checkpoint(
    path: Path,
    *,
    vision: Mapping[str, int] = VISION_SIZES,
    text: Mapping[str, int] = TEXT_SIZES,
    image_size: int = 336,
) -> Path:
    """Write the checkpoint to `path` (1.4 GB, bfloat16) unless one is there already.

    Other sizes make a smaller one. An image takes 576 tokens if it has 336 pixels a side.
    """
    weights = path / "model.safetensors"
    if weights.is_file():
        use_hub_names(weights)
        return path
    config = make_config(path, vision=vision, text=text, image_size=image_size)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(path)
    use_hub_names(weights)
    return path


def use_hub_names(weights: Path) -> None:
    """Give the tower's tensors the names that LLaVA's checkpoints on the Hub have.

    transformers writes newer ones, which it reads as well as those, but not every engine does.
    """
    with safe_open(weights, "pt") as file:
        known = file.keys()
    names = {name: NEW_NAME.sub(r"vision_tower.vision_model.\1", name) for name in known}
    if all(name == new_name for name, new_name in names.items()):
        return
    tensors = {names[name]: tensor for name, tensor in load_file(weights).items()}
    new = weights.with_suffix(".new")
    save_file(tensors, new, {"format": "pt"})
    new.replace(weights)


def make_config(
    path: Path, *, vision: Mapping[str, int], text: Mapping[str, int], image_size: int = 336
) -> LlavaConfig:
    """Write all but weights to `path`: config, tokenizer, image processor."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            **vision,
            image_size=image_size,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            **text,
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=4096,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=(image_size // 14) ** 2,
        architectures=["LlavaForConditionalGeneration"],
    )
    config.save_pretrained(path)
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    ).save_pretrained(path)
    CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
    ).save_pretrained(path)
    return config


def _vocabulary() -> dict[str, int]:
    """Bytes, special tokens, and fillers up to the model's vocabulary."""
    names = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<filler_{i}>" for i in range(len(names), VOCAB_SIZE)]
    names[IMAGE_TOKEN] = "<image>"
    return {name: index for index, name in enumerate(names)}
