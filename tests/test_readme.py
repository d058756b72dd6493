"""What the README shows works."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from checkpoints import make_llava
from mm_engine import LLM, SamplingParams
from parity import picture

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_plugin_on_one_screen_serves_a_model(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(# mm_foo/plugin.py\n.*?)```", README, re.DOTALL)
    assert len(blocks) == 1
    plugin = tmp_path / "plugin.py"
    plugin.write_text(blocks[0])
    checkpoint = make_llava(tmp_path / "checkpoint", tower="siglip")
    config = json.loads((checkpoint / "config.json").read_text())
    config["architectures"] = ["FooForConditionalGeneration"]
    (checkpoint / "config.json").write_text(json.dumps(config))

    llm = LLM(str(checkpoint), plugins=(str(plugin),), load_format="dummy", progress=False)
    prompt = {"prompt": "USER: <image> what?", "multi_modal_data": {"image": picture(1)}}
    (output,) = llm.generate([prompt], SamplingParams(max_tokens=5, ignore_eos=True))

    assert output.error is None
    assert len(output.outputs[0].token_ids) == 5
    assert output.prompt_token_ids.count(llm.pipeline._placeholder) == 16


def test_every_file_that_is_linked_exists() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)|src=\"([^\":]+)\"", README)
    assert len(links) > 5
    for pair in links:
        path = next(part for part in pair if part)
        assert (Path(__file__).parents[1] / path).exists(), path


@pytest.mark.parametrize("record", sorted(Path(__file__).parents[1].glob("benchmarks/results/*")))
def test_the_table_is_the_record(record: Path) -> None:
    rows = json.loads(record.read_text())["rows"]
    assert rows
    for row in rows:
        assert f"**{row['ratio']:.2f}×**" in README, row["name"]
