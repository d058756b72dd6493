"""`engine plugins new`: what it writes works unmodified, as an author would use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from installing import engine
from mm_engine.errors import StartupError
from mm_engine.testing.scaffold import names_of, requirement, write_plugin
from serving import ServerProcess

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Made:
    project: Path
    site: Path  # where it is installed
    output: str  # of the command


def run(*command: str | Path, cwd: Path | None = None, path: Path | None = None) -> str:
    environment = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A project outside of the repository, installed as a wheel; nothing is fetched."""
    folder = tmp_path_factory.mktemp("made")
    done = engine("plugins", "new", "mm-foo", "--path", str(folder), fresh=True)
    assert done.returncode == 0, done.stderr
    project, site = folder / "mm-foo", folder / "site"
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target"]
    run(sys.executable, "-m", "pip", "install", *options, site, project)
    return Made(project, site, done.stdout)


def test_it_passes_its_check(made: Made) -> None:
    done = engine("plugins", "check", "mm-foo", "--json", path=[made.site])
    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    assert report["architecture"] == "FooForConditionalGeneration"
    states = {result["name"]: result["status"] for result in report["results"]}
    assert set(states.values()) == {"passed"}
    assert any(name.startswith("parity-") for name in states)  # transformers knows the model


def test_its_own_tests_pass(made: Made) -> None:
    options = ["-q", "-p", "no:cacheprovider"]
    told = run(BIN / "pytest", *options, cwd=made.project, path=made.site)
    assert " passed" in told and "skipped" not in told


def test_it_answers(made: Made) -> None:
    code = (
        "import sys; from PIL import Image; from mm_engine import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], kv_cache_memory=2**22, progress=False)\n"
        "parts = [{'type': 'image', 'image': Image.new('RGB', (50, 30))},"
        " {'type': 'text', 'text': 'What?'}]\n"
        "(answer,) = llm.chat([{'role': 'user', 'content': parts}],"
        " SamplingParams(temperature=0, max_tokens=7))\n"
        "print(len(answer.outputs[0].token_ids), llm.engine.info.plugin)"
    )
    tiny = made.project / "mm_foo" / "tiny"
    assert run(sys.executable, "-c", code, tiny, path=made.site) == "7 mm-foo 0.1.0\n"


def test_it_is_served(made: Made, tmp_path: Path) -> None:
    tiny = made.project / "mm_foo" / "tiny"
    flags = (str(tiny), "--kv-cache-memory", "4MiB")
    with (
        ServerProcess(tmp_path, *flags, env={"PYTHONPATH": str(made.site)}) as server,
        server.client() as client,
    ):
        answer = client.completions.create(model="tiny", prompt="Once", max_tokens=3, temperature=0)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 3


def test_it_is_listed_and_doctor_finds_nothing_in_it(made: Made) -> None:
    listed = json.loads(engine("plugins", "list", "--json", path=[made.site]).stdout)
    (row,) = [row for row in listed if row["distribution"] == "mm-foo"]
    assert (row["hooks"], row["state"]) == (["model_class", "max_tokens"], "ok")
    report = json.loads(engine("plugins", "doctor", "--json", path=[made.site]).stdout)
    assert "mm-foo 0.1.0" in report["plugins"]
    assert [f for f in report["findings"] if f["distribution"] == "mm-foo"] == []


def test_its_wheel_has_the_types_and_the_checkpoint(made: Made) -> None:
    files = {file.relative_to(made.site).as_posix() for file in made.site.rglob("*")}
    assert {"mm_foo/py.typed", "mm_foo/tiny/model.safetensors"} <= files
    assert not any(file.startswith("tests") for file in files)
    assert 100_000 < (made.site / "mm_foo" / "tiny" / "model.safetensors").stat().st_size < 10**6


def test_next_steps_are_told(made: Made) -> None:
    for step in (f"cd {made.project}", 'pip install -e ".[dev]"', "engine plugins check mm-foo"):
        assert step in made.output


def test_it_passes_ruff_and_mypy(made: Made) -> None:
    run(BIN / "ruff", "check", "--no-cache", cwd=made.project)
    run(BIN / "ruff", "format", "--check", "--no-cache", cwd=made.project)
    cache = ROOT / ".mypy_cache" / "scaffold"
    run(BIN / "mypy", "--cache-dir", cache, cwd=made.project, path=made.project)


def test_long_names_pass_ruff_too(tmp_path: Path) -> None:
    names = names_of("mm-" + "a" * 37, "B" * 60)
    write_plugin(names, tmp_path / "new")
    run(BIN / "ruff", "check", "--no-cache", cwd=tmp_path / "new")
    run(BIN / "ruff", "format", "--check", "--no-cache", cwd=tmp_path / "new")


def test_the_same_weights_are_drawn_each_time(made: Made, tmp_path: Path) -> None:
    write_plugin(names_of("mm-foo"), tmp_path / "again")
    one, other = (
        (folder / "mm_foo" / "tiny" / "model.safetensors").read_bytes()
        for folder in (made.project, tmp_path / "again")
    )
    assert one == other


def test_no_template_is_left_unfilled(made: Made) -> None:
    """A workflow's own `${{ … }}` and nothing else has a dollar sign."""
    for file in made.project.rglob("*"):
        if (
            file.is_file()
            and file.suffix not in (".safetensors", ".pyc")
            and "tiny" not in str(file)
        ):
            text = file.read_text("utf-8").replace("${{ matrix.python }}", "")
            assert "$" not in text, file


@pytest.mark.parametrize(
    ("name", "package", "architecture"),
    [
        ("mm-foo", "mm_foo", "FooForConditionalGeneration"),
        ("mm-foo-next", "mm_foo_next", "FooNextForConditionalGeneration"),
        ("Foo.Vision2", "foo_vision2", "FooVision2ForConditionalGeneration"),
    ],
)
def test_names_follow_from_the_first(name: str, package: str, architecture: str) -> None:
    names = names_of(name)
    assert (names.distribution, names.package, names.architecture) == (name, package, architecture)


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("", "it is empty"),
        ("mm foo", "it holds ' '"),
        ("mm/foo", "it holds '/'"),
        ("mm-fóo", "it holds 'ó'"),
        ("-mm-foo", "it must start and end with a letter or a digit"),
        ("mm-foo_", "it must start and end with a letter or a digit"),
        ("a" * 41, "the name is too long: 41 characters. Take at most 40"),
        ("2foo", "can't import a package of this name: 2foo"),
        ("class", "can't import a package of this name: class"),
        ("json", "a module of this name is there already: json (Python's own)"),
        ("torch", "a module of this name is there already: torch"),
        ("MM.Engine", "a module of this name is there already: mm_engine"),
    ],
)
def test_bad_name_is_refused_with_the_reason(name: str, fact: str) -> None:
    with pytest.raises(StartupError) as caught:
        names_of(name)
    assert fact in str(caught.value)


@pytest.mark.parametrize("architecture", ["Foo For", "2Foo", "None", "Foo-Bar", "F" * 61])
def test_bad_architecture_is_refused(architecture: str) -> None:
    with pytest.raises(StartupError, match="architecture"):
        names_of("mm-foo", architecture)


@pytest.mark.parametrize(
    ("version", "wanted"),
    [
        ("0.1.0", "mm-engine>=0.1,<0.2"),
        ("0.10.3.dev1+local", "mm-engine>=0.10,<0.11"),
        ("2.3.1", "mm-engine>=2.3,<3"),
    ],
)
def test_requirement_is_the_range_without_breaks(version: str, wanted: str) -> None:
    assert requirement(version) == wanted


def test_nothing_is_written_over(tmp_path: Path) -> None:
    (tmp_path / "mm-foo").mkdir()
    (tmp_path / "mm-foo" / "mine").write_text("precious")
    done = engine("plugins", "new", "mm-foo", "--path", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: there is something already: {tmp_path}/mm-foo. Take")
    assert [file.name for file in tmp_path.rglob("*")] == ["mm-foo", "mine"]


def test_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(step: str) -> None:
        if step.startswith("Drawing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_plugin(names_of("mm-foo"), tmp_path / "mm-foo", on_step=stop)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="can't be written: .*file"):
        write_plugin(names_of("mm-foo"), tmp_path / "file" / "mm-foo")
