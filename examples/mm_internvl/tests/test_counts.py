"""The count of an image's tokens, and the whole prompt, are those of transformers' processor."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import mm_internvl
import pytest
import torch
from mm_internvl.counts import max_pictures, num_image_tokens
from mm_internvl.plugin import map_image, max_tokens
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    get_all_supported_aspect_ratios,
)
from transformers.models.internvl.processing_internvl import InternVLProcessor

from mm_engine.plugins import ModelContext, StartupError

TINY = Path(mm_internvl.__file__).parent / "tiny"
SIZES = [(1, 1), (32, 32), (33, 32), (64, 32), (32, 65), (96, 64), (7, 500), (640, 48), (211, 97)]


class ImagesOnly(InternVLProcessor):
    """Without its video processor, which can't be had without torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
        """Take None for the video processor."""


@pytest.fixture(scope="module")
def ctx() -> ModelContext:
    return ModelContext(
        hf_config=AutoConfig.from_pretrained(TINY),
        checkpoint=TINY,
        tokenizer=AutoTokenizer.from_pretrained(TINY),
        dtype=torch.float32,
        max_model_len=1024,
        limits={"image": 8},
        architecture="InternVLForConditionalGeneration",
    )


@pytest.fixture(scope="module")
def processor(ctx: ModelContext) -> Any:
    return ImagesOnly(
        image_processor=AutoImageProcessor.from_pretrained(TINY),
        tokenizer=ctx.tokenizer,
        image_seq_length=ctx.hf_config.image_seq_length,
        chat_template=ctx.tokenizer.chat_template,
    )


@pytest.mark.parametrize("size", SIZES)
def test_a_count_is_that_of_the_processor(
    ctx: ModelContext, processor: Any, size: tuple[int, int]
) -> None:
    (count,) = processor._get_num_multimodal_tokens([size[::-1]])["num_image_tokens"]
    num_pictures, _, _, side = map_image(ctx, Image.new("RGB", size))["pixel_values"].shape
    found = num_image_tokens(ctx.hf_config, num_pictures, side)
    assert found == count - 2  # transformers counts the markers, too
    assert found <= max_tokens(ctx, "image")


@pytest.mark.parametrize(("side", "patch", "ratio"), [(32, 8, 0.5), (48, 8, 0.5), (39, 8, 0.25)])
def test_a_count_is_the_rows_of_the_model(side: int, patch: int, ratio: float) -> None:
    config: Any = AutoConfig.from_pretrained(TINY)
    config.vision_config.patch_size, config.downsample_ratio = (patch, patch), ratio
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.inference_mode():
        pictures = model.get_image_features(torch.zeros(3, 3, side, side), return_dict=True)
    assert num_image_tokens(config, 3, side) == pictures.pooler_output.flatten(0, 1).shape[0]


@pytest.mark.parametrize("min_tiles", range(1, 8))
@pytest.mark.parametrize("max_tiles", [1, 2, 6, 7, 12])
def test_the_most_pictures_are_those_of_the_largest_grid(min_tiles: int, max_tiles: int) -> None:
    grids = get_all_supported_aspect_ratios(min_tiles, max_tiles) or [(1, 1)]
    most = max(width * height for width, height in grids)
    assert max_pictures(min_tiles, max_tiles) == (most + 1 if most > 1 else 1)


def test_a_prompt_is_that_of_the_processor(
    processor: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    images = [Image.new("RGB", size, "teal") for size in ((64, 32), (40, 40))]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    files = [part for number in (0, 1) for part in ("--image", str(tmp_path / f"{number}.png"))]
    command = ["engine", "plugins", "trace", str(TINY), "--prompt", "Which is wider?", *files]
    monkeypatch.setattr("sys.argv", [*command, "--json"])
    (engine,) = entry_points(group="console_scripts", name="engine")
    with pytest.raises(SystemExit) as end:  # in this process: another would import torch again
        engine.load()()
    assert not end.value.code
    parts = json.loads(capfd.readouterr().out)["after"]
    ids = [token for part in parts for token in part["token_ids"] * part["count"]]

    content = [*[{"type": "image"}] * 2, {"type": "text", "text": "Which is wider?"}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ids == processor(images=images, text=[text])["input_ids"][0]


@pytest.mark.parametrize(
    "change", [{"vision_feature_select_strategy": "full"}, {"downsample_ratio": 0.3}]
)
def test_what_transformers_cannot_shuffle_is_refused(
    ctx: ModelContext, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    for name, value in change.items():
        monkeypatch.setattr(ctx.hf_config, name, value)
    with pytest.raises(StartupError):
        max_tokens(ctx, "image")
