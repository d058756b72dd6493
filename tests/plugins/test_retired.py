"""The deprecation path: retired hooks, arguments and fields work for a version, and are named."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy
import pytest
from packaging.version import Version

from mm_engine.config import EngineConfig, ModelContext
from mm_engine.contract import contract_version
from mm_engine.errors import PluginError
from mm_engine.plugins import hookimpl, hookspecs
from mm_engine.plugins.plugin import Plugin
from mm_engine.plugins.registration import hook_names, register, signature_of
from mm_engine.plugins.retired import Retired, RetiredField, retired_uses, spec_options
from mm_engine.worker.loader import open_model

hookspec = pluggy.HookspecMarker("mm_engine")
NOTICE = Retired(since="0.1", gone_in="0.2", instead="ctx.scale")


def specs(**options: Any) -> ModuleType:
    """Specifications of the test's own: the required hooks, and `resize` with an argument `old`."""
    module: Any = ModuleType("specs")
    module.PROJECT = "mm_engine"

    def model_class(ctx: Any) -> Any: ...

    def max_tokens(ctx: Any) -> Any: ...

    def resize(ctx: Any, old: int) -> Any: ...

    module.model_class = hookspec(firstresult=True)(model_class)
    module.max_tokens = hookspec(firstresult=True)(max_tokens)
    module.resize = hookspec(firstresult=True, **options)(resize)
    return module


def gone() -> ModuleType:
    """The same, a version later."""
    module: Any = specs()

    def resize(ctx: Any) -> Any: ...

    module.resize = hookspec(firstresult=True)(resize)
    return module


def plugin_module(resize: Callable[..., Any]) -> ModuleType:
    module: Any = ModuleType("mm_test_retired")
    module.model_class = hookimpl(lambda ctx: object)
    module.max_tokens = hookimpl(lambda ctx: 4)
    module.resize = hookimpl(resize)
    return module


def uses(module: Any, specified: ModuleType) -> list[str]:
    functions = {name: getattr(module, name) for name in hook_names(specified)}
    return retired_uses(functions, "mm-test 0.1.0", specified)


def old_resize(ctx: Any, old: int) -> int:
    return old * 10


def new_resize(ctx: Any) -> int:
    return 70


def test_retired_argument_still_arrives_and_one_line_names_who_uses_it() -> None:
    specified = specs(warn_on_impl_args={"old": NOTICE})
    module = plugin_module(old_resize)
    manager = register(module, "mm-test 0.1.0", specified)  # pytest makes warnings errors
    assert manager.hook.resize(ctx=None, old=7) == 70
    (line,) = uses(module, specified)
    assert re.fullmatch(
        r"mm-test 0\.1\.0 · resize \(\S*test_retired\.py:\d+\): the argument old is retired "
        r"since mm-engine 0\.1 and will be gone in 0\.2\. Use ctx\.scale\.",
        line,
    )


def test_plugin_that_leaves_the_retired_argument_out_hears_nothing() -> None:
    specified = specs(warn_on_impl_args={"old": NOTICE})
    module = plugin_module(new_resize)
    assert register(module, "mm-test 0.1.0", specified).hook.resize(ctx=None, old=7) == 70
    assert uses(module, specified) == []


def test_retired_hook_is_still_called_and_named() -> None:
    specified = specs(warn_on_impl=NOTICE)
    module = plugin_module(new_resize)
    assert register(module, "mm-test 0.1.0", specified).hook.resize(ctx=None, old=7) == 70
    (line,) = uses(module, specified)
    assert "resize (" in line and "): this hook is retired since mm-engine 0.1" in line


def test_argument_that_is_gone_is_an_error_with_the_signature() -> None:
    with pytest.raises(PluginError) as error:
        register(plugin_module(old_resize), "mm-test 0.1.0", gone())
    assert "expected resize(ctx), got an argument named old." in str(error.value)
    assert signature_of("resize", specs()) == "resize(ctx, old)"


@pytest.fixture
def modality_retired(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if `max_tokens` of the real hooks were about to lose its second argument."""
    options = spec_options(hookspecs, "max_tokens")
    monkeypatch.setitem(options, "warn_on_impl_args", {"modality": NOTICE})


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "retired" in record.getMessage()]


@pytest.mark.usefixtures("modality_retired")
def test_installed_plugin_works_and_is_named_once_in_the_log(
    llava: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "mm_engine"):
        found = open_model(EngineConfig(model=str(llava), progress=False))
        assert found.plugin.max_tokens(found.ctx, "image") == 16
        assert found.plugin.max_tokens(found.ctx, "image") == 16
        # The engine process, which loads the plugin by the front's record, doesn't repeat it.
        open_model(EngineConfig(model=str(llava), progress=False), found.plugin.record)
    (line,) = lines_of(caplog)
    assert re.match(r"mm-llava \S+ · max_tokens \(mm_llava/plugin\.py:\d+\): the argument ", line)
    assert "modality is retired since mm-engine 0.1 and will be gone in 0.2. Use ctx.scale" in line


@pytest.mark.usefixtures("modality_retired")
def test_plugin_keeps_its_notices(make_plugin: Callable[..., Plugin]) -> None:
    (notice,) = make_plugin().notices
    assert notice.startswith("mm-test 0.1.0 · max_tokens (mm_test/plugin.py:")


@pytest.mark.usefixtures("modality_retired")
def test_plugin_that_has_moved_on_has_none(make_plugin: Callable[..., Plugin]) -> None:
    assert make_plugin("@hookimpl\ndef max_tokens(ctx): return 4").notices == []


def test_plugins_of_today_use_nothing_retired(make_plugin: Callable[..., Plugin]) -> None:
    assert make_plugin().notices == []


def test_retired_field_is_read_and_its_readers_are_named_once(
    make_plugin: Callable[..., Plugin], ctx: ModelContext, caplog: pytest.LogCaptureFixture
) -> None:
    class Context(ModelContext):
        size = RetiredField(lambda self: self.max_model_len, NOTICE)

    old = Context(**{f.name: getattr(ctx, f.name) for f in dataclasses.fields(ctx)})
    plugin = make_plugin("@hookimpl\ndef max_tokens(ctx): return ctx.size", timeout=30.0)
    with caplog.at_level(logging.WARNING, "mm_engine"):
        assert plugin.max_tokens(old, "image") == 64
        assert plugin.max_tokens(old, "video") == 64  # the hook is called again
    (line,) = lines_of(caplog)
    assert line.startswith("mm-test 0.1.0 · max_tokens (mm_test/plugin.py:10): Context.size is ret")
    assert "will be gone in 0.2. Use ctx.scale." in line


@pytest.mark.parametrize("hook", hook_names())
def test_nothing_outlives_the_version_that_it_was_to_be_gone_in(hook: str) -> None:
    options = spec_options(hookspecs, hook)
    notices = [options["warn_on_impl"], *(options["warn_on_impl_args"] or {}).values()]
    for notice in filter(None, notices):
        assert Version(notice.gone_in) > Version(contract_version()), f"take it out of {hook}"
