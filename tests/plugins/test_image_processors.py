"""The checkpoint's image processor, for plugins with a mapper of their own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mm_engine.config import ModelContext
from mm_engine.errors import StartupError
from mm_engine.plugins import image_processor


def test_image_processor_is_the_checkpoints_and_read_once(ctx: ModelContext) -> None:
    processor = image_processor(ctx)
    assert dict(processor.crop_size) == {"height": 16, "width": 16}
    assert image_processor(ctx) is processor


def test_checkpoint_without_an_image_processor_is_named(ctx: ModelContext, tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="no usable image processor"):
        image_processor(dataclasses.replace(ctx, checkpoint=tmp_path))
