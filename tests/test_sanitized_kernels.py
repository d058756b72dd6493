"""The tests of the C++ kernels once more, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The editable install's finder would win over the folder with the sanitized module.
RUN = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "Scikit" not in type(f).__name__]
sys.path.insert(0, {site!r})
from mm_engine_kernels import _cpu
assert _cpu.__file__.startswith({site!r}), _cpu.__file__
{code}
"""
TESTS = "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
PAST_THE_END = """
import torch
weight, packed = torch.zeros(16 * 8), torch.zeros(16 * 8)
_cpu.pack(weight.data_ptr(), 8, 16, 8, 0, packed.data_ptr())
print("all is well", flush=True)
_cpu.pack(weight.data_ptr(), 8, 16, 8, 0, packed[64:].data_ptr())
print("nobody saw it")
"""


class Sanitized:
    """A copy of the package with a module that the sanitizers watch."""

    def __init__(self, folder: Path) -> None:
        compiler = shutil.which(os.environ.get("CXX", "c++"))
        if sys.platform != "linux" or compiler is None:
            pytest.skip("needs Linux and a C++ compiler with its sanitizers")
        # C++'s library as well: the sanitizer looks for its `throw` before the module brings it.
        self._libraries = []
        for name in ("libasan.so", "libstdc++.so"):
            found = subprocess.run(
                [compiler, f"-print-file-name={name}"], capture_output=True, text=True
            ).stdout.strip()
            if not Path(found).is_absolute():
                pytest.skip(f"{compiler} has no {name}")
            self._libraries.append(found)
        self._site = folder / "site"
        shutil.copytree(
            ROOT / "kernels" / "mm_engine_kernels",
            self._site / "mm_engine_kernels",
            ignore=shutil.ignore_patterns("*.so", "__pycache__"),
        )
        import nanobind
        from mm_engine_kernels.cpu import extension

        options = {
            "MM_SANITIZE": "ON",
            # What this CPU chooses by itself, what any other falls back to, and AMX in C++.
            "MM_ISAS": f"{extension.isas()[0]};baseline;tiles",
            "MM_EMULATE_TILES": "ON",
            "Python_EXECUTABLE": sys.executable,
            "nanobind_DIR": nanobind.cmake_dir(),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(self._site / "mm_engine_kernels"),
        }
        build = str(folder / "build")
        sources = ("-S", str(ROOT / "kernels" / "cmake"), "-B", build, "-G", "Ninja")
        for command in (
            ("cmake", *sources, *(f"-D{name}={value}" for name, value in options.items())),
            ("cmake", "--build", build),
        ):
            path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
            done = subprocess.run(
                command, capture_output=True, text=True, env={**os.environ, "PATH": path}
            )
            assert done.returncode == 0, done.stdout + done.stderr

    def run(self, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Python with the sanitizers loaded first, in the checkout's root."""
        environment = {
            **os.environ,
            "LD_PRELOAD": ":".join(self._libraries),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python's own are many
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        return subprocess.run(
            [sys.executable, "-c", RUN.format(site=str(self._site), code=code), *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Sanitized:
    return Sanitized(tmp_path_factory.mktemp("sanitized"))


def test_the_sanitizers_see_a_write_past_the_end(sanitized: Sanitized) -> None:
    done = sanitized.run(PAST_THE_END)
    assert "all is well" in done.stdout and "nobody saw it" not in done.stdout
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


def test_tiles_are_emulated_where_they_can_be(sanitized: Sanitized) -> None:
    """So that the tests run what AMX does, on a CPU that hasn't got it; nothing else takes it."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("AMX is x86's")
    done = sanitized.run("print(_cpu.isas(), _cpu.isa())")
    assert done.returncode == 0, done.stderr
    assert "'tiles'] " in done.stdout and not done.stdout.strip().endswith("tiles")


def test_the_kernels_pass_their_tests_under_the_sanitizers(sanitized: Sanitized) -> None:
    # Captured, what the sanitizers write as they end the process would be lost.
    options = ("-q", "-s", "-n0", "-p", "no:cacheprovider")
    once = "threads2 or test_threads or not threads"  # not with each number of threads
    done = sanitized.run(TESTS, *options, "-k", once, "tests/cpu_kernels")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert " passed" in done.stdout
