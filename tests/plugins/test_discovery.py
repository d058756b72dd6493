"""Finding plugins by their metadata, and loading the one that was asked for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from mm_engine.errors import StartupError
from mm_engine.plugins.discovery import PluginRecord, default_model, demos, find, installed, load

Install = Callable[..., Path]
ARCH = "TestForConditionalGeneration"
HOOKS = """
from mm_engine.plugins import hookimpl
from torch import nn
@hookimpl
def model_class(ctx): return nn.Identity
@hookimpl
def max_tokens(ctx, modality): return 4
"""


def mine() -> list[PluginRecord]:
    return [record for record in installed() if record.distribution.startswith("mm-test")]


def test_installed_reads_metadata_and_imports_nothing(install: Install) -> None:
    install("mm-test", "1.2", {ARCH: "mm_test_one"}, {"mm_test_one.py": "raise SystemExit(3)"})
    assert mine() == [PluginRecord("mm-test", "1.2", "mm_test_one", ARCH)]
    assert find(ARCH) == mine()[0]
    assert "mm_test_one" not in sys.modules


def test_finding_a_plugin_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, mm_engine.plugins.discovery as d; d.installed(); d.demos();"
        "print([n for n in ('torch', 'transformers', 'mm_llava') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_broken_plugin_of_another_model_is_harmless(install: Install) -> None:
    install("mm-test-a", "1", {"Other": "mm_test_a"}, {"mm_test_a.py": "raise SystemExit(3)"})
    install("mm-test-b", "1", {ARCH: "mm_test_b"}, {"mm_test_b.py": HOOKS})
    assert load(find(ARCH)).hooks == ("model_class", "max_tokens")
    assert "mm_test_a" not in sys.modules


def test_two_claimants_are_both_named_with_the_flag_that_chooses(install: Install) -> None:
    install("mm-test-a", "1.0", {ARCH: "mm_test_a"})
    install("mm-test-b", "2.0", {ARCH: "mm_test_b"})
    with pytest.raises(StartupError) as error:
        find(ARCH)
    assert "mm-test-a 1.0" in str(error.value)
    assert "mm-test-b 2.0" in str(error.value)
    assert f"--plugin {ARCH}=mm-test-" in str(error.value)
    assert find(ARCH, [f"{ARCH}=mm-test-a"]).module == "mm_test_a"
    assert find(ARCH, ["Other=mm-test-a", f"{ARCH}=MM_Test.B"]).module == "mm_test_b"


def test_choice_of_a_distribution_that_does_not_serve_it_is_refused(install: Install) -> None:
    install("mm-test-a", "1.0", {ARCH: "mm_test_a"})
    with pytest.raises(StartupError, match=r"mm-else.*installed: mm-test-a"):
        find(ARCH, [f"{ARCH}=mm-else"])


def test_choice_that_is_neither_form_is_refused() -> None:
    with pytest.raises(StartupError, match="ARCHITECTURE=DISTRIBUTION"):
        find(ARCH, ["mm-test"])


def test_unclaimed_architecture_lists_what_is_installed(install: Install) -> None:
    install("mm-test-a", "1.0", {ARCH: "mm_test_a"})
    with pytest.raises(StartupError) as error:
        find("NobodysForConditionalGeneration")
    assert "NobodysForConditionalGeneration" in str(error.value)
    assert f"mm-test-a 1.0 ({ARCH})" in str(error.value)
    assert "pip install" not in str(error.value)


def test_unclaimed_but_known_architecture_suggests_its_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", [])  # nothing is installed
    with pytest.raises(StartupError, match=r"pip install mm-llava\. Installed plugins: none"):
        find("LlavaForConditionalGeneration")


@pytest.mark.parametrize("damage", ["no METADATA", "no version", "no entry points", "binary"])
def test_damaged_metadata_elsewhere_is_ignored(install: Install, damage: str) -> None:
    install("mm-test-good", "1.0", {"Good": "mm_test_good"})
    folder = install("mm-test-bad", "1.0", {ARCH: "mm_test_bad"})
    (info,) = folder.glob("*.dist-info")
    if damage == "no METADATA":
        (info / "METADATA").unlink()
    elif damage == "no version":
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mm-test-bad\n")
    elif damage == "no entry points":
        (info / "entry_points.txt").write_text("[mm_engine.plugins]\nno equals sign\n")
    else:
        (info / "entry_points.txt").write_bytes(b"\xff\xfe[mm_engine.plugins]")
    assert find("Good").distribution == "mm-test-good"


def test_one_distribution_twice_on_the_path_is_no_conflict(install: Install) -> None:
    install("mm-test", "0.9", {ARCH: "mm_test_one"})
    install("mm-test", "1.0", {ARCH: "mm_test_one"}, {"mm_test_one.py": HOOKS})  # comes first
    assert find(ARCH).version == "1.0"
    assert load(find(ARCH)).label == "mm-test 1.0"


def test_load_refuses_another_version_than_the_record_names(install: Install) -> None:
    install("mm-test", "1.0", {ARCH: "mm_test_one"}, {"mm_test_one.py": HOOKS})
    record = find(ARCH)
    install("mm-test", "1.1", {ARCH: "mm_test_one"}, {"mm_test_one.py": HOOKS})
    with pytest.raises(StartupError, match=r"1\.1, not 1\.0"):
        load(record)
    with pytest.raises(StartupError, match="isn't installed any more: mm-test-gone"):
        load(PluginRecord("mm-test-gone", "1.0", "mm_test_one", ARCH))


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import mm_test_missing", "ModuleNotFoundError: No module named 'mm_test_missing'"),
        ("raise SystemExit('bye')", "SystemExit: bye"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("def (", "SyntaxError"),
    ],
)
def test_failing_import_is_one_line_with_the_cause(
    install: Install, source: str, cause: str
) -> None:
    install("mm-test", "1.0", {ARCH: "mm_test_one"}, {"mm_test_one.py": source})
    with pytest.raises(StartupError) as error:
        load(find(ARCH))
    assert "mm-test 1.0 can't be imported" in str(error.value)
    assert cause in str(error.value)
    assert "\n" not in str(error.value)


def test_entry_point_to_nowhere_says_so(install: Install) -> None:
    install("mm-test", "1.0", {ARCH: "mm_test_nowhere.plugin"})
    with pytest.raises(StartupError, match="No module named 'mm_test_nowhere'"):
        load(find(ARCH))


def test_interrupt_while_importing_passes(install: Install) -> None:
    source = {"mm_test_one.py": "raise KeyboardInterrupt"}
    install("mm-test", "1.0", {ARCH: "mm_test_one"}, source)
    with pytest.raises(KeyboardInterrupt):
        load(find(ARCH))


def test_record_crosses_processes_as_plain_data() -> None:
    record = PluginRecord("mm-test", "1.0", "mm_test_one", ARCH, path="/a.py")
    assert msgspec.json.decode(msgspec.json.encode(record), type=PluginRecord) == record


def test_demos_are_folders_of_packages_that_stay_unimported(install: Install) -> None:
    files = {"mm_test_one/__init__.py": "raise SystemExit", "mm_test_one/demo/config.json": "{}"}
    demo = {"test-demo": "mm_test_one.demo", "test-gone": "mm_test_one.gone", "test-no": "mm_no.x"}
    folder = install("mm-test", "1.0", files=files, demos=demo)
    found = {name: path for name, path in demos().items() if name.startswith("test-")}
    assert found == {"test-demo": folder / "mm_test_one" / "demo"}
    assert "mm_test_one" not in sys.modules


def test_default_model_is_a_bundled_demo(install: Install) -> None:
    files = {"mm_test_one/__init__.py": "", "mm_test_one/demo/config.json": "{}"}
    install("mm-test", files=files, demos={"a-demo": "mm_test_one.demo"})
    assert default_model() == "a-demo"


def test_without_a_demo_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(StartupError, match="Name a checkpoint, or run: pip install mm-llava"):
        default_model()
