"""The LLaVA-NeXT demo's model: the LLaVA demo's weights with a newline between rows of tiles."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
)

from tower import PATCH
from views import PINPOINTS, TiledBatch, make_image_processor


def tiled_model(start: Path) -> LlavaNextForConditionalGeneration:
    """Return the LLaVA checkpoint at ``start`` as LLaVA-NeXT, in float32.

    ``image_newline`` is new and comes from torch's current random state; every other weight is
    the checkpoint's.
    """
    plain = LlavaForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    same = LlavaConfig.from_pretrained(start)
    config = LlavaNextConfig(
        vision_config=same.vision_config,
        text_config=same.text_config,
        image_token_index=same.image_token_index,
        projector_hidden_act=same.projector_hidden_act,
        vision_feature_select_strategy=same.vision_feature_select_strategy,
        vision_feature_layer=same.vision_feature_layer,
        image_seq_length=same.image_seq_length,
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=False,
    )
    model = LlavaNextForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(plain.state_dict(), strict=False)
    if missing != ["model.image_newline"] or unexpected:
        raise ValueError(
            f"{start} doesn't fit LLaVA-NeXT: {missing} missing, {unexpected} left over."
            " Start from the demo of mm-llava."
        )
    model.set_attn_implementation("eager")  # as in fresh_model: faster for the tower's 145 patches
    model.model.language_model.set_attn_implementation("sdpa")  # and this for 500 to 1000 tokens
    return model


def tiled_processor(start: Path) -> LlavaNextProcessor:
    """Return the processor of the checkpoint at ``start``, with the image steps of LLaVA-NeXT."""
    plain = LlavaProcessor.from_pretrained(start)
    for leaked in ("is_local", "local_files_only"):  # how it was loaded is not the tokenizer's own
        plain.tokenizer.init_kwargs.pop(leaked, None)
    return LlavaNextProcessor(
        image_processor=make_image_processor(),
        tokenizer=plain.tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=plain.chat_template,
    )


def tiled_image_states(model: LlavaNextForConditionalGeneration, batch: TiledBatch) -> torch.Tensor:
    """Return the batch's image tokens ``[batch, image_tokens, hidden]``; the tower learns nothing.

    All pictures of a batch have one size, so transformers packs each into as many tokens.
    """
    inner = model.model
    num_pictures, num_views = batch.pixel_values.shape[:2]
    with torch.no_grad():
        views = batch.pixel_values.flatten(0, 1)
        features = inner.vision_tower(views).last_hidden_state[:, 1:]
    features = inner.multi_modal_projector(features)
    width, height = batch.size
    images, _ = inner.pack_image_features(
        features.unflatten(0, (num_pictures, num_views)),
        [(height, width)] * num_pictures,
        vision_feature_select_strategy="default",
        image_newline=inner.image_newline,
    )
    return torch.stack(images)
