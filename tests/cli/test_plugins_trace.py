"""`engine plugins trace`: one request's way through the hooks, on a terminal and as JSON."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from pictures import quarters
from serving import ENGINE


def traced(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [ENGINE, "plugins", "trace", *arguments],
        env={**os.environ, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


def test_layout_has_ids_ranges_tensors_keys_and_times(llava: Path) -> None:
    lines = traced(str(llava)).stdout.splitlines()
    assert lines[0] == "No --image was given: this is a picture of 448×336 pixels."
    assert "(LlavaForConditionalGeneration) · plugin mm-llava " in lines[1] + lines[2]
    rows = [line.split() for line in lines]
    before = next(row for row in rows if row[1:4] == ["4", "<image>", "image"])
    after = next(row for row in rows if row[1:3] == ["4×16", "<image>×16"])
    assert before[-2:] == after[-2:] == ["image", "0"]
    item = next(row for row in rows if row[:3] == ["image", "0", "448×336"])
    offset = int(after[0])
    assert item[3:6] == [f"{offset}–{offset + 15}", "16", "16"]
    assert item[6:8] == ["pixel_values", "float32"]
    (mapper,) = [row for row in rows if row[:1] == ["register_input_mapper"]]
    assert mapper[1:3] == ["mm-engine's", "default"]
    assert float(mapper[-1]) > 0


def test_json_has_the_same_for_machines(llava: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    quarters(50, 20).save(picture)
    arguments = [str(llava), "--image", str(picture), "--prompt", "Why?", "--run", "--json"]
    found = json.loads(traced(*arguments, "--dtype", "float32").stdout)
    assert found["own_picture"] is False
    assert "Why?" in found["prompt"]
    (item,) = found["items"]
    assert (item["width"], item["height"], item["num_tokens"]) == (50, 20, 16)
    assert len(item["content_key"]) == 64
    assert item["tensors"] == [{"name": "pixel_values", "dtype": "float32", "shape": [3, 32, 32]}]
    assert found["num_after"] == found["num_before"] + 15
    assert found["run"]["first_step_seconds"] > 0
    assert [hook["hook"] for hook in found["hooks"]][-1] == "embed_images"


def test_failing_hook_is_shown_after_what_came_before_it(llava: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "wrong.py"
    plugin.write_text(
        "from mm_llava.plugin import *\n@hookimpl\ndef input_processor(ctx, inputs): return None\n"
    )
    done = traced(str(llava), "--plugin", str(plugin), code=1)
    assert done.stderr == ""
    assert "Before the input processor: " in done.stdout
    assert "After it" not in done.stdout
    ended = " ".join(done.stdout.partition("Here it ended: ")[2].split())
    assert ended.startswith("wrong.py sha256:")
    assert ended.endswith("expected PromptInputs, got None.")


def test_picture_that_is_none_is_one_line() -> None:
    done = traced("--image", __file__, code=1)
    assert done.stdout == ""
    assert "not a PNG, JPEG, WebP or GIF" in done.stderr
