"""The wheels: what is in them, and that they run without the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from platform import machine
from typing import Any
from zipfile import ZipFile

import pytest

from serving import ServerProcess

ROOT = Path(__file__).parents[1]
SOURCES = (ROOT, ROOT / "kernels", *(file.parent for file in ROOT.glob("plugins/*/pyproject.toml")))


def run(
    *command: str | Path,
    cwd: Path | None = None,
    path: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    environment = {**os.environ, **(environment or {}), **({"PYTHONPATH": path} if path else {})}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    # The kernels' objects are those of the editable installation: only the link is done again.
    build_dir = str(ROOT / "kernels" / "cmake")
    for source in SOURCES:
        environment = {"SKBUILD_BUILD_DIR": build_dir} if source.name == "kernels" else {}
        run(
            *("-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source),
            environment=environment,
        )
    return {wheel.name.partition("-")[0]: wheel for wheel in folder.glob("*.whl")}


def names_in(wheel: Path) -> set[str]:
    with ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_each_distribution_has_a_wheel_with_types_and_licence(wheels: dict[str, Path]) -> None:
    assert set(wheels) >= {"mm_engine", "mm_engine_kernels", "mm_llava", "mm_llava_next"}
    for name, wheel in wheels.items():
        names = names_in(wheel)
        assert f"{name}/py.typed" in names
        assert any(file.endswith("licenses/LICENSE") for file in names)
        tops = {file.partition("/")[0] for file in names}
        assert {top for top in tops if not top.endswith(".dist-info")} == {name}


def test_wheels_hold_every_file_of_their_packages(wheels: dict[str, Path]) -> None:
    for source in SOURCES:
        package = source / "core" / "mm_engine" if source == ROOT else None
        package = package or next(file.parent for file in source.glob("*/py.typed"))
        files = {
            file.relative_to(package.parent).as_posix()
            for file in package.rglob("*")
            if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith(".")
        }
        assert files - names_in(wheels[package.name]) == set()


def test_installed_wheels_work_without_the_checkout(
    wheels: dict[str, Path], tmp_path: Path
) -> None:
    """Installed into a folder of their own; third parties come from this environment.

    `-S` keeps the editable installs' .pth files out, so that nothing is found in the checkout.
    """
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path, *wheels.values())
    path = os.pathsep.join([str(tmp_path), sysconfig.get_path("purelib")])
    listed = run("-S", tmp_path / "bin" / "engine", "plugins", "list", "--json", path=path)
    rows = {row["distribution"]: row for row in json.loads(listed)}
    assert rows["mm-llava"]["state"] == rows["mm-llava-next"]["state"] == "ok"
    code = "import mm_engine.plugins.discovery as d; print(*d.demos().values())"
    demos = run("-S", "-c", code, path=path).split()
    assert demos and all(demo.startswith(str(tmp_path)) for demo in demos)
    kernels = run("-S", "-c", KERNELS, path=path).split()
    assert kernels[0].startswith(str(tmp_path)) and kernels[1] == "cpp"


KERNELS = "from mm_engine_kernels import ops; print(ops.__file__, ops.chosen('cpu'))"


def test_one_wheel_has_all_instruction_sets_and_passes_its_tests_without_a_compiler(
    wheels: dict[str, Path], tmp_path: Path
) -> None:
    environment = Environment(tmp_path / "venv")
    environment.install(wheels["mm_engine_kernels"])
    (module,) = environment.site.glob("mm_engine_kernels/_cpu.*.so")
    sets = {"x86_64": ("avx2", "avx512", "avx512_bf16", "amx"), "aarch64": ("neon", "neon_bf16")}
    content = module.read_bytes()
    assert all(f"\0{name}\0".encode() in content for name in sets.get(machine(), ()))
    shutil.copytree(ROOT / "tests" / "cpu_kernels", tmp_path / "cpu_kernels")
    for name in ("conftest.py", "interpreting.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path)
    quick = ("rms_norm", "rotary", "silu_mul", "largest", "sample")  # all of them take minutes
    files = [tmp_path / "cpu_kernels" / f"test_{name}.py" for name in quick]
    done = subprocess.run(
        [environment.python, "-c", TESTS, module.parent, "-q", "-n0", "-k", "threads2", *files],
        cwd=tmp_path,
        env={"PATH": str(environment.python.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


TESTS = """
import shutil, sys, pytest
from mm_engine_kernels import _cpu
assert _cpu.__file__.startswith(sys.argv[1]), _cpu.__file__
assert not any(map(shutil.which, ("c++", "g++", "clang++", "cc")))
sys.exit(pytest.main(sys.argv[2:]))
"""


def test_without_a_compiler_the_kernels_install_and_say_what_is_missing(tmp_path: Path) -> None:
    run(
        *("-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT / "kernels"),
        environment={"SKBUILD_BUILD_DIR": str(tmp_path / "build"), "CXX": "/no/compiler"},
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert not any(name.endswith(".so") for name in names_in(wheel))
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel)
    path = os.pathsep.join([str(tmp_path / "site"), sysconfig.get_path("purelib")])
    said = run("-S", "-c", KERNELS, path=path)
    assert "reference (torch" in said
    assert "the C++ kernels can't be loaded" in said and "a C++20 compiler" in said


class Environment:
    """A virtual environment with some of the wheels, and nothing of the checkout.

    Third parties are those of the environment that the tests run in.
    """

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.engine = str(folder / "bin" / "engine")
        (self.site,) = folder.glob("lib/python*/site-packages")
        others = folder / "others"
        others.mkdir()
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not entry.name.startswith("mm_") and entry.suffix != ".pth":
                (others / entry.name).symlink_to(entry)
        (self.site / "others.pth").write_text(f"{others}\n")
        self.python = folder / "bin" / "python"

    def install(self, *wheels: Path) -> None:
        """As `pip install` does, in this environment."""
        run("-m", "pip", "--python", self.python, "install", "--quiet", "--no-deps", *wheels)

    def plugins(self, command: str) -> Any:
        """What `engine plugins <command> --json` says."""
        done = subprocess.run(
            [self.engine, "plugins", command, "--json"], capture_output=True, text=True
        )
        assert done.returncode in (0, 1), done.stderr
        return json.loads(done.stdout)

    def listed(self) -> dict[str, Any]:
        """The rows of `engine plugins list`, by distribution."""
        return {row["distribution"]: row for row in self.plugins("list")}


@contextmanager
def served(environment: Environment, folder: Path) -> Iterator[ServerProcess]:
    """mm-llava's demo, served from the environment."""
    folder.mkdir()
    flags = ("llava-demo", "--dtype", "float32", "--kv-cache-memory", "32MiB")
    with ServerProcess(folder, *flags, program=(environment.engine,)) as server:
        yield server


def answer(server: ServerProcess) -> str:
    body = {"prompt": "A picture of", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return str(server.http.post("/v1/completions", json=body).json()["choices"][0]["text"])


def architectures(server: ServerProcess) -> dict[str, str]:
    cards = server.http.get("/v1/plugins").json()["data"]
    return {card["architecture"]: card["distribution"] for card in cards}


def test_another_plugin_appears_by_pip_install_alone_and_a_broken_one_harms_nobody(
    wheels: dict[str, Path], tmp_path: Path
) -> None:
    environment = Environment(tmp_path / "venv")
    environment.install(*(wheels[name] for name in ("mm_engine", "mm_engine_kernels", "mm_llava")))
    assert list(environment.listed()) == ["mm-llava"]
    with served(environment, tmp_path / "first") as server:
        expected = answer(server)
        assert architectures(server) == {"LlavaForConditionalGeneration": "mm-llava"}

        environment.install(wheels["mm_llava_next"])  # and no other step, not even a restart
        both = environment.listed()
        assert list(both) == ["mm-llava", "mm-llava-next"]
        assert {row["state"] for row in both.values()} == {"ok"}
        assert both["mm-llava-next"]["architectures"] == ["LlavaNextForConditionalGeneration"]
        assert architectures(server)["LlavaNextForConditionalGeneration"] == "mm-llava-next"
        assert answer(server) == expected
    healthy = environment.plugins("doctor")
    assert healthy["ok"], healthy

    info = environment.site / "mm_broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mm-broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[mm_engine.plugins]\nBrokenForConditionalGeneration = mm_broken\n"
        "[mm_engine.demos]\na-broken-demo = mm_broken.demo\n"
    )
    (environment.site / "mm_broken.py").write_text("raise SystemExit('broken on purpose')")
    rows = environment.listed()
    assert rows.pop("mm-broken")["state"].startswith("broken: ")
    assert rows == both
    with served(environment, tmp_path / "second") as server:
        assert answer(server) == expected
    found = environment.plugins("doctor")
    assert not found["ok"]
    assert {finding["distribution"] for finding in found["findings"]} == {"mm-broken"}
    assert "broken on purpose" in str(found)
