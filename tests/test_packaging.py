"""The wheels: what is in them, and that they run without the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = (ROOT, ROOT / "kernels", *(file.parent for file in ROOT.glob("plugins/*/pyproject.toml")))


def run(*command: str | Path, cwd: Path | None = None, path: str | None = None) -> str:
    environment = {**os.environ, **({"PYTHONPATH": path} if path else {})}
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
    for source in SOURCES:
        run("-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source)
    return {wheel.name.partition("-")[0]: wheel for wheel in folder.glob("*.whl")}


def names_in(wheel: Path) -> set[str]:
    with ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_each_distribution_has_a_wheel_with_types_and_licence(wheels: dict[str, Path]) -> None:
    assert set(wheels) >= {"mm_engine", "mm_engine_kernels", "mm_llava"}
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
    assert rows["mm-llava"]["state"] == "ok"
    code = "import mm_engine.plugins.discovery as d; print(*d.demos().values())"
    demos = run("-S", "-c", code, path=path).split()
    assert demos and all(demo.startswith(str(tmp_path)) for demo in demos)
