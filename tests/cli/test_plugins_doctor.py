"""`engine plugins doctor`: one environment with everything wrong that can be, examined once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from installing import HOOKS, engine, write_distribution

ROOT = Path(__file__).parents[2]
TIMEOUT = "10"


@dataclass(frozen=True)
class Environment:
    folder: Path  # on the import path
    sources: Path  # of editable installations
    code: int
    report: dict[str, Any]

    def of(self, name: str) -> list[tuple[str, str, str]]:
        return [
            (found["kind"], found["problem"], found["cure"])
            for found in self.report["findings"]
            if found["distribution"] == name
        ]


def write_plugin(folder: Path, name: str, code: str = HOOKS, **options: Any) -> Path:
    """A distribution with one module of hooks."""
    module = name.replace("-", "_")
    plugins = options.pop("plugins", {f"Architecture_{module}": module})
    files = {f"{module}.py": code}
    return write_distribution(folder, name, plugins=plugins, files=files, **options)


def write_everything(folder: Path, sources: Path) -> None:
    write_plugin(folder, "mm-test-good", requires=["mm-engine", "no-such; extra == 'x'"])
    sources.mkdir()
    write_imports(folder, sources)
    write_metadata(folder)
    write_sources(folder, sources)


def write_imports(folder: Path, sources: Path) -> None:
    write_plugin(folder, "mm-test-raises", "x = 1\nraise RuntimeError('no luck')\n")
    write_plugin(folder, "mm-test-library", "import no_such_library\n")
    write_plugin(folder, "mm-test-exits", "raise SystemExit(3)\n")
    write_plugin(folder, "mm-test-dies", "import os\nos._exit(7)\n")
    write_plugin(folder, "mm-test-crashes", "import os, signal\nos.kill(os.getpid(), 11)\n")
    write_plugin(
        folder,
        "mm-test-hangs",
        f"""
        import os, subprocess, time
        child = subprocess.Popen(["sleep", "1000"])
        open({str(sources / "child")!r}, "w").write(str(child.pid))
        time.sleep(1000)
        """,
    )
    write_plugin(folder, "mm-test-noisy", f"import os; print('noise'); os.write(1, b'x')\n{HOOKS}")
    write_plugin(folder, "mm-test-misspelt", HOOKS.replace("max_tokens", "max_token"))
    write_plugin(folder, "mm-test-lacks", HOOKS.replace("@hookimpl\ndef max", "def max"))
    write_plugin(folder, "mm-test-forks", f"import os\nos.fork()\n{HOOKS}")
    write_plugin(
        folder,
        "mm-test-garbles",
        """
        import contextlib, os
        for descriptor in range(3, 99):
            with contextlib.suppress(OSError): os.write(descriptor, b"nonsense\\n")
        """,
    )
    source = sources / "edited"
    write_plugin(folder, "mm-test-edited", HOOKS.replace("ctx, modality", "ctx, x"), source=source)
    (source / "pyproject.toml").write_text(
        "[project]\nname = 'mm-test-edited'\n"
        "[project.entry-points.'mm_engine.plugins']\n"
        "Architecture_mm_test_edited = 'mm_test_edited'\n"
    )


def write_metadata(folder: Path) -> None:
    write_plugin(folder, "mm-test-older", requires=["mm-engine<0.1"])
    write_plugin(folder, "mm-test-newer", requires=["mm-engine>=99,<100"])
    write_plugin(folder, "mm-test-needs", "import no_such", requires=["rich>=999", "no-such>=1"])
    write_plugin(folder, "mm-test-vision", "import cv2", requires=["no-opencv-python"])
    write_plugin(folder, "mm-test-wrong", requires=["this is no requirement"])
    write_plugin(folder, "mm-test-owner-a", plugins={"Owned": "mm_test_owner_a"})
    write_plugin(folder, "mm-test-owner-b", plugins={"Owned": "mm_test_owner_b"})
    write_plugin(folder, "mm-test-twice")
    write_distribution(folder / "later", "mm_test_twice", "0.2", plugins={"Twice": "mm_test_twice"})
    write_plugin(folder, "mm-test-lost", record=True)
    (folder / "mm_test_lost.py").unlink()
    write_plugin(folder, "mm-test-nowhere", plugins={"Nowhere": "mm_test_nowhere.plugin"})
    write_plugin(folder, "mm-test-object", plugins={"Object": "mm_test_object:hooks"})
    write_plugin(folder, "mm-test-demo", demos={"test-demo": "mm_test_demo_package.demo"})
    write_plugin(
        folder, "mm-test-config", configs={"Architecture_mm_test_config": "mm_test_config_p.tiny"}
    )
    (folder / "mm_test_config_p" / "tiny").mkdir(parents=True)
    (write_plugin(folder, "mm-test-nameless") / "METADATA").write_text("Metadata-Version: 2.1\n")
    (write_plugin(folder, "mm-test-binary") / "METADATA").write_bytes(b"Name: \xff\xfe\n")
    info = write_plugin(folder, "mm-test-points")
    (info / "entry_points.txt").write_text("[mm_engine.plugins\nX = mm_test_points\n")
    write_plugin(folder, "mm-test-renamed").rename(folder / "other-0.1.0.dist-info")
    write_plugin(folder, "mm-test-version", version="not.a.version!")
    (folder / "mm_test_empty-0.1.dist-info").mkdir()
    (write_plugin(folder, "mm-test-record") / "RECORD").write_text("a,b\n")
    (write_plugin(folder, "mm-test-unlisted") / "RECORD").write_text("")
    info = write_plugin(folder, "mm-test-egg", "x = 1\nraise RuntimeError('no luck')\n")
    (info / "METADATA").rename(info / "PKG-INFO")
    info.rename(folder / "mm_test_egg-0.1.0.egg-info")
    info = write_plugin(folder, "mm-test-cut", requires=["mm-engine"], record=True)
    (info / "entry_points.txt").write_text("")


def write_sources(folder: Path, sources: Path) -> None:
    write_plugin(folder, "mm-test-gone", source=sources / "gone")
    shutil.rmtree(sources / "gone")
    for name, version, extra in (
        ("moved", "0.2", ""),
        ("grown", "0.1", "New = 'mm_test_grown'\n"),
        ("same", "0.1.0", ""),
    ):
        source = sources / name
        write_plugin(folder, f"mm-test-{name}", source=source)
        (source / "pyproject.toml").write_text(
            f"[project]\nname = 'mm-test-{name}'\nversion = '{version}'\n"
            "[project.entry-points.'mm_engine.plugins']\n"
            f"Architecture_mm_test_{name} = 'mm_test_{name}'\n{extra}"
        )


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder, sources = (tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("x") / "sources")
    write_everything(folder, sources)
    path = [folder, folder / "later", *sorted(sources.iterdir())]
    done = engine("plugins", "doctor", "--json", "--timeout", TIMEOUT, path=path)
    assert done.stderr == ""
    return Environment(folder, sources, done.returncode, json.loads(done.stdout))


FINDINGS = {
    "raises": ("import-error", "raised RuntimeError: no luck", "pip install --upgrade {name}"),
    "library": (
        "import-error",
        "No module named 'no_such_library'; its dependencies must name what brings that module",
        "pip install --upgrade {name}",
    ),
    "exits": ("import-error", "raised SystemExit: 3", "pip install --upgrade {name}"),
    "dies": ("dies", "ended the interpreter with exit code 7", "pip install --upgrade {name}"),
    "crashes": ("dies", "ended the interpreter by SIGSEGV", "pip install --upgrade {name}"),
    "hangs": ("hangs", f"takes longer than {TIMEOUT} s", "engine plugins doctor --timeout 40"),
    "garbles": ("dies", "ended the interpreter with exit code 0", "pip install --upgrade {name}"),
    "egg": ("import-error", "raised RuntimeError: no luck", "pip install --upgrade {name}"),
    "misspelt": (
        "hooks",
        "max_token (mm_test_misspelt.py:6): marked with @hookimpl, but there is no such hook. "
        "Did you mean max_tokens(ctx, modality)?",
        "pip install --upgrade {name}",
    ),
    "lacks": ("hooks", "max_tokens (mm_test_lacks): a required", "pip install --upgrade {name}"),
    "edited": ("hooks", "an argument named x", "${{EDITOR:-vi}} +6 {sources}/edited/{module}.py"),
    "older": ("requirement", "it needs mm-engine<0.1, and", "pip install --upgrade {name}"),
    "newer": ("requirement", "it needs mm-engine<100,>=99", "pip install 'mm-engine<100,>=99'"),
    "wrong": (
        "damaged-metadata",
        "a requirement that is none: 'this is no requirement'",
        "pip install --force-reinstall --no-deps {name}",
    ),
    "owner-b": (
        "two-owners",
        "it claims Owned, and so does mm-test-owner-a 0.1.0; keep one, or choose at each start",
        "engine serve MODEL --plugin Owned=mm-test-owner-a  # or =mm-test-owner-b",
    ),
    "twice": (
        "duplicate-metadata",
        "mm_test_twice-0.2.dist-info of {folder}/later is passed over",
        "rm -r {folder}/later/mm_test_twice-0.2.dist-info && "
        "pip install --force-reinstall --no-deps {name}",
    ),
    "lost": (
        "files-gone",
        "files that were installed are gone: mm_test_lost.py",
        "pip install --force-reinstall --no-deps {name}",
    ),
    "nowhere": (
        "module-missing",
        "mm_engine.plugins: Nowhere = mm_test_nowhere.plugin): there is no such module",
        "pip install --force-reinstall --no-deps {name}",
    ),
    "object": (
        "damaged-metadata",
        "entry_points.txt names no module for Object: 'mm_test_object:hooks'",
        "pip install --force-reinstall --no-deps {name}",
    ),
    "demo": (
        "folder-missing",
        "mm_engine.demos: test-demo = mm_test_demo_package.demo): there is no such folder",
        "pip install --force-reinstall --no-deps {name}",
    ),
    "config": (
        "folder-missing",
        "there is no config.json in {folder}/mm_test_config_p/tiny",
        "pip install --force-reinstall --no-deps {name}",
    ),
    "nameless": (
        "damaged-metadata",
        "METADATA has no Name",
        "pip install --force-reinstall --no-deps {name}",
    ),
    "binary": (
        "damaged-metadata",
        "METADATA can't be read (UnicodeDecodeError)",
        "pip install --force-reinstall --no-deps {name}",
    ),
    "renamed": (
        "damaged-metadata",
        "METADATA names another distribution than its folder: mm-test-renamed in {folder}/other",
        "pip install --force-reinstall --no-deps {name}",
    ),
    "version": (
        "damaged-metadata",
        "METADATA has a version that is none: 'not.a.version!'",
        "pip install --force-reinstall --no-deps {name}",
    ),
    "empty": (
        "damaged-metadata",
        "METADATA can't be read (FileNotFoundError)",
        "pip install --force-reinstall --no-deps {name}",
    ),
    "record": (
        "damaged-metadata",
        "RECORD can't be read (a row has other columns than path, hash and size)",
        "pip install --force-reinstall --no-deps {name}",
    ),
    "unlisted": (
        "damaged-metadata",
        "RECORD can't be read (it doesn't list METADATA)",
        "pip install --force-reinstall --no-deps {name}",
    ),
    "points": (
        "damaged-metadata",
        "entry_points.txt can't be read",
        "pip install --force-reinstall --no-deps {name}",
    ),
    "cut": (
        "damaged-metadata",
        "entry_points.txt has 0 bytes, and",
        "pip install --force-reinstall --no-deps {name}",
    ),
    "gone": (
        "source-gone",
        "its source is gone: {sources}/gone",
        "pip uninstall -y {name}",
    ),
    "moved": ("version-changed", "has version 0.2 by now", "pip install -e {sources}/moved"),
    "grown": ("entry-points-changed", "New = 'mm_test_grown'", "pip install -e {sources}/grown"),
}


@pytest.mark.parametrize("short", FINDINGS)
def test_what_is_wrong_is_found_with_its_cure(environment: Environment, short: str) -> None:
    name = f"mm-test-{short}"
    values = {
        "name": name,
        "module": name.replace("-", "_"),
        "folder": environment.folder,
        "sources": environment.sources,
    }
    kind, problem, cure = FINDINGS[short]
    ((found_kind, found_problem, found_cure),) = environment.of(name)
    assert found_kind == kind
    assert problem.format(**values) in found_problem
    assert "\n" not in found_problem
    assert found_cure == cure.format(**values)


def test_each_requirement_that_is_not_met_is_told_once(environment: Environment) -> None:
    """The import error that comes of one of them is not told again."""
    rich = metadata.version("rich")
    assert environment.of("mm-test-needs") == [
        ("requirement", f"it needs rich>=999, and {rich} is installed", "pip install 'rich>=999'"),
        ("requirement", "it needs no-such>=1, which isn't installed", "pip install 'no-such>=1'"),
    ]
    assert environment.of("mm-test-vision") == [
        (
            "requirement",
            "it needs no-opencv-python, which isn't installed",
            "pip install no-opencv-python",
        )
    ]


@pytest.mark.parametrize("short", ["good", "noisy", "same", "owner-a", "forks"])
def test_sound_plugins_beside_them_are_left_alone(environment: Environment, short: str) -> None:
    assert environment.of(f"mm-test-{short}") == []
    assert f"mm-test-{short} 0.1.0" in environment.report["plugins"]


def test_something_wrong_is_exit_code_1(environment: Environment) -> None:
    assert (environment.code, environment.report["ok"]) == (1, False)


def test_what_a_hanging_plugin_started_is_ended(environment: Environment) -> None:
    pid = int((environment.sources / "child").read_text())
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def third_parties(folder: Path) -> Path:
    """A folder with what this environment has installed, mm-engine and plugins left out."""
    folder.mkdir()
    for file in Path(sysconfig.get_path("purelib")).iterdir():
        if not file.name.startswith(("mm_", "_mm_", "__")) and file.suffix != ".pth":
            (folder / file.name).symlink_to(file)
    return folder


def doctor_of(path: list[Path]) -> subprocess.CompletedProcess[str]:
    """The command with nothing but `path` to import from (`-S` keeps this environment out)."""
    code = "import sys; sys.argv[0] = 'engine'; from mm_engine.cli.main import main; main()"
    return subprocess.run(
        [sys.executable, "-S", "-c", code, "plugins", "doctor"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "COLUMNS": "60"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_all_well_is_one_line_and_exit_code_0_and_a_broken_one_is_one_more(tmp_path: Path) -> None:
    own = [ROOT / "core", ROOT / "kernels", third_parties(tmp_path / "third")]
    good, bad = tmp_path / "good", tmp_path / "bad"
    write_distribution(good, "mm-engine", "0.1.0")
    write_plugin(good, "mm-test-good", requires=["mm-engine>=0.1,<0.2"])
    done = doctor_of([good, *own])
    assert (done.returncode, done.stdout) == (0, "All well: mm-test-good 0.1.0.\n"), done.stderr
    write_plugin(bad, "mm-test-bad", "import no_such_library\n")
    done = doctor_of([good, bad, *own])
    assert (done.returncode, done.stderr) == (1, "")
    (line,) = done.stdout.splitlines()
    assert line == (
        "✗ mm-test-bad 0.1.0: can't be imported: mm_test_bad raised ModuleNotFoundError: "
        "No module named 'no_such_library'; its dependencies must name what brings that module. "
        "Run: pip install --upgrade mm-test-bad"
    )
