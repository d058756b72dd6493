"""Which plugin and which checkpoint are meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from installing import HOOKS, write_distribution
from mm_engine.errors import StartupError
from mm_engine.plugins.discovery import demos
from mm_engine.testing import check_plugin
from mm_engine.testing.target import find_target

LLAVA = "LlavaForConditionalGeneration"
CONFIG = '{"architectures": ["%s"], "model_type": "llava"}'


def test_distribution_and_architecture_mean_the_same_plugin() -> None:
    target = find_target("mm_LLaVA", None)
    assert target == find_target(LLAVA, None)
    assert target.record.distribution == "mm-llava"
    assert target.folder == demos()["llava-demo"].resolve()
    assert (target.is_config, target.origin) == (False, "bundled: llava-demo")


def test_model_may_be_the_name_of_a_demo() -> None:
    assert find_target("mm-llava", "llava-demo").folder == demos()["llava-demo"]


def test_unknown_plugin_is_refused_with_those_there_are() -> None:
    with pytest.raises(StartupError, match=f"no such plugin is installed: mm-nothing.*{LLAVA}"):
        find_target("mm-nothing", None)


def test_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIG % "OtherForConditionalGeneration")
    with pytest.raises(StartupError, match="another architecture than mm-llava serves: Other"):
        find_target("mm-llava", str(tmp_path))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_config_for_tests_is_found_by_its_entry_point(site: Path) -> None:
    write_distribution(
        site,
        "mm-test",
        plugins={"TestForConditionalGeneration": "mm_test.plugin"},
        configs={"TestForConditionalGeneration": "mm_test.small.tiny"},
        files={
            "mm_test/__init__.py": "",
            "mm_test/plugin.py": HOOKS,
            "mm_test/small/tiny/config.json": CONFIG % "TestForConditionalGeneration",
        },
    )
    target = find_target("mm-test", None)
    assert target.folder == (site / "mm_test/small/tiny").resolve()
    assert (target.is_config, target.origin) == (True, "mm_engine.test_configs of mm-test")


def test_demo_of_another_architecture_or_without_weights_is_passed_over(site: Path) -> None:
    write_distribution(
        site,
        "mm-test",
        plugins={"TestForConditionalGeneration": "mm_test.plugin"},
        demos={"other": "mm_test.other", "empty": "mm_test.empty", "gone": "mm_test.gone"},
        files={
            "mm_test/__init__.py": "",
            "mm_test/plugin.py": HOOKS,
            "mm_test/other/config.json": CONFIG % LLAVA,
            "mm_test/other/model.safetensors": "",
            "mm_test/empty/config.json": CONFIG % "TestForConditionalGeneration",
        },
    )
    assert find_target("mm-test", None).folder is None


def test_plugin_without_a_checkpoint_is_told_what_to_add(site: Path) -> None:
    files = {"mm_test/__init__.py": "", "mm_test/plugin.py": HOOKS}
    plugins = {"TestForConditionalGeneration": "mm_test.plugin"}
    write_distribution(site, "mm-test", plugins=plugins, files=files)
    report = check_plugin("mm-test")
    (failure,) = report.failures
    assert failure.name == "checkpoint-opens"
    assert (failure.expected, failure.got) == ("a checkpoint to check the plugin with", "none")
    assert "mm_engine.test_configs" in (failure.hint or "")
    assert report.checkpoint is None


def test_distribution_with_several_architectures_must_be_named_by_one(site: Path) -> None:
    plugins = {"BForConditionalGeneration": "mm_test.b", "AForConditionalGeneration": "mm_test.a"}
    write_distribution(site, "mm-test", plugins=plugins)
    with pytest.raises(StartupError, match="means several plugins: AFor.*, BFor.*. Name one."):
        find_target("mm-test", None)
    assert find_target("BForConditionalGeneration", None).record.module == "mm_test.b"


def test_architecture_of_two_distributions_must_be_named_by_one(site: Path) -> None:
    for name in ("mm-test-b", "mm-test-a"):
        write_distribution(site, name, plugins={"TestModel": "mm_test.plugin"})
    with pytest.raises(StartupError, match="means several plugins: mm-test-a, mm-test-b"):
        find_target("TestModel", None)


def test_file_names_its_config_without_being_run(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small/config.json").write_text(CONFIG % LLAVA)
    file = tmp_path / "my_model.py"
    file.write_text('raise SystemExit\nTEST_CONFIG = "./small"\n')
    target = find_target(str(file), None)
    assert target.folder == (tmp_path / "small").resolve()
    assert target.is_config
    assert target.record.architecture == LLAVA


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('TEST_CONFIG = "./nowhere"', "TEST_CONFIG names a folder without config.json"),
        ("TEST_CONFIG = HERE / 'tiny'", "TEST_CONFIG in the plugin file isn't a written-out path"),
        (
            'TEST_CONFIG = "."\nARCHITECTURES = ["Other"]',
            f"another architecture than my_model.py serves: {LLAVA}, not Other",
        ),
    ],
)
def test_file_whose_config_cannot_be_used_is_refused(
    source: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(CONFIG % LLAVA)
    (tmp_path / "my_model.py").write_text(source)
    with pytest.raises(StartupError, match=message):
        find_target(str(tmp_path / "my_model.py"), None)


def test_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="the plugin file can't be read"):
        find_target(str(tmp_path / "gone.py"), None)
