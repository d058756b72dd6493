"""What `engine serve` prints: true, and its curl line works when it is pasted."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mm_engine.cli.banner import curl_line
from mm_engine.cli.model_choice import choose_model, model_names, other_demos
from mm_engine.plugins.discovery import demos
from serving import ServerProcess


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint's folder with a picture, at a path that a shell would split."""
    copy = tmp_path_factory.mktemp("it's a path") / "my model"
    shutil.copytree(min(demos().items())[1], copy)
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(copy / "example.png")
    assert (copy / "example.png").stat().st_size > 2**17  # more than Linux takes as one argument
    return copy


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    flags = (str(folder), "--kv-cache-memory", "64MiB")
    with ServerProcess(tmp_path_factory.mktemp("banner"), *flags) as started:
        yield started


def test_it_says_what_is_served_by_whom_and_how_much_fits(server: ServerProcess) -> None:
    shown = dict(line.split(None, 1) for line in server.output.splitlines() if "  " in line)
    assert shown["model"].strip() == "my model"
    assert shown["plugin"].startswith("mm-llava ")
    assert shown["KV"].startswith("cache") and " tokens" in shown["KV"]
    assert shown["address"].strip() == f"{server.url}/v1"


def test_the_curl_line_works_when_pasted(server: ServerProcess) -> None:
    (line,) = (line for line in server.output.splitlines() if " curl -s " in line)
    done = subprocess.run(
        ["sh", "-c", line], capture_output=True, text=True, timeout=60, check=True
    )
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"]
    assert answer["usage"]["prompt_tokens"] > 100  # the picture was seen


def test_a_folder_is_served_under_its_name_and_its_path(
    server: ServerProcess, folder: Path
) -> None:
    listed = server.http.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["my model"]
    for name in ("my model", str(folder)):
        body = {"model": name, "prompt": "x", "max_tokens": 1}
        answer = server.http.post("/v1/completions", json=body).json()
        assert answer["model"] == "my model"


def test_a_demo_names_the_other_one(server: ServerProcess, tmp_path: Path) -> None:
    assert {"llava-demo", "llava-next-demo"} <= set(demos())
    with ServerProcess(tmp_path, "llava-next-demo", "--kv-cache-memory", "64MiB") as started:
        lines = [line.strip() for line in started.output.splitlines()]
    (line,) = (line for line in lines if line.startswith("bundled too"))
    assert "engine serve llava-demo" in line and "llava-next-demo" not in line
    assert "bundled too" not in server.output  # it serves a folder


def test_without_a_name_the_first_demo_is_taken_and_the_others_are_told() -> None:
    chosen, remark = choose_model(None)
    assert chosen == "llava-demo"
    assert remark is not None and "llava-next-demo" in remark
    assert other_demos("llava-demo") == [name for name in sorted(demos()) if name != "llava-demo"]
    assert other_demos("org/name") == []


def test_names_of_demos_and_hub_ids_stay_as_they_are() -> None:
    assert model_names("org/name") == ("org/name",)
    assert model_names(min(demos())) == (min(demos()),)


def test_the_curl_line_sends_a_key_from_the_environment() -> None:
    line = curl_line("http://h:1", "m", Path("p.png"), key=True)
    assert '-H "Authorization: Bearer $MM_ENGINE_API_KEY"' in line
