"""The engine process loads the front's plugin, or none."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from engine_process import CONFIG
from mm_engine.config import EngineConfig
from mm_engine.engine.client import EngineClient
from mm_engine.errors import StartupError
from mm_engine.inputs.pipeline import InputPipeline
from mm_engine.plugins.record import PluginRecord
from mm_engine.worker.loader import open_model


def label_of_engine(
    config: EngineConfig, pipeline: InputPipeline, record: PluginRecord | None = None
) -> str:
    """Start an engine with the front's record (or `record`), end it; the plugin it loaded."""

    async def start() -> str:
        given = record or pipeline.plugin.record
        client = await EngineClient.start(config, pipeline.dummy_request(), given)
        await client.close()
        return client.info.plugin

    return asyncio.run(start())


def test_another_version_is_refused_with_both_named(pipeline: InputPipeline) -> None:
    record = replace(pipeline.plugin.record, version="0.0.9")
    message = rf"{record.distribution} .*: {pipeline.plugin.record.version}, not 0\.0\.9"
    with pytest.raises(StartupError, match=message):
        label_of_engine(CONFIG, pipeline, record)


def test_file_that_changed_in_between_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "own_plugin.py"
    file.write_text("from mm_llava.plugin import *\n")
    config = replace(CONFIG, plugins=(str(file),))
    pipeline = InputPipeline(open_model(config))
    file.write_text("from mm_llava.plugin import *\n# edited\n")
    with pytest.raises(StartupError, match="changed since it was found"):
        label_of_engine(config, pipeline)


def test_fronts_record_decides_and_not_what_the_engine_would_find(
    pipeline: InputPipeline, tmp_path: Path
) -> None:
    file = tmp_path / "own_plugin.py"
    file.write_text("raise SystemExit\n")
    config = replace(CONFIG, plugins=(str(file),))
    assert label_of_engine(config, pipeline) == pipeline.plugin.label
