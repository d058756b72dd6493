"""What pluggy would let pass or say in its own words."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mm_engine.errors import PluginError
from mm_engine.plugins.plugin import Plugin
from mm_engine.plugins.registration import REQUIRED, hook_names, signature_of

MakePlugin = Callable[..., Plugin]


def test_unknown_hook_suggests_the_closest(make_plugin: MakePlugin) -> None:
    with pytest.raises(PluginError) as error:
        make_plugin("@hookimpl\ndef input_procesor(ctx, inputs): return inputs")
    assert str(error.value) == (
        "mm-test 0.1.0 · input_procesor (mm_test/plugin.py:9): marked with @hookimpl, but there "
        "is no such hook. Did you mean input_processor(ctx, inputs)?"
    )


def test_hook_unlike_any_lists_them_all(make_plugin: MakePlugin) -> None:
    with pytest.raises(PluginError) as error:
        make_plugin("@hookimpl\ndef xyz(): pass")
    assert all(name in str(error.value) for name in hook_names())


def test_hook_that_pluggy_would_take_as_optional_is_unknown_too(make_plugin: MakePlugin) -> None:
    with pytest.raises(PluginError, match="no such hook"):
        make_plugin("@hookimpl(optionalhook=True)\ndef xyz(): pass")


def test_wrong_argument_name_shows_the_signature(make_plugin: MakePlugin) -> None:
    with pytest.raises(PluginError) as error:
        make_plugin("@hookimpl\ndef input_processor(ctx, prompt): return prompt")
    assert str(error.value) == (
        "mm-test 0.1.0 · input_processor (mm_test/plugin.py:9): expected "
        "input_processor(ctx, inputs), got an argument named prompt."
    )


@pytest.mark.parametrize("hook", REQUIRED)
def test_missing_required_hook_is_named(make_plugin: MakePlugin, hook: str) -> None:
    (other,) = set(REQUIRED) - {hook}
    source = f"from mm_engine.plugins import hookimpl\n@hookimpl\ndef {other}(ctx): pass"
    with pytest.raises(PluginError) as error:
        make_plugin(hooks=source)
    assert f"· {hook} (mm_test.plugin): a required hook is missing" in str(error.value)
    assert signature_of(hook) in str(error.value)


def test_required_hook_without_the_mark_is_told_to_be_marked(make_plugin: MakePlugin) -> None:
    source = "def model_class(ctx): pass\ndef max_tokens(ctx, modality): return 4"
    with pytest.raises(PluginError, match="The function is there; mark it with @hookimpl"):
        make_plugin(hooks=source)


@pytest.mark.parametrize("body", ["yield", "await x"])
def test_generators_and_coroutines_are_refused(make_plugin: MakePlugin, body: str) -> None:
    prefix = "async " if "await" in body else ""
    with pytest.raises(PluginError, match="expected a plain function"):
        make_plugin(f"@hookimpl\n{prefix}def placeholder_text(ctx): {body}")


def test_hook_may_leave_arguments_out_and_bear_another_name(make_plugin: MakePlugin) -> None:
    plugin = make_plugin("@hookimpl(specname='placeholder_text')\ndef text(): return 'a <image>'")
    assert plugin.hooks == ("model_class", "max_tokens", "placeholder_text")


def test_hooks_may_be_imported_from_another_plugin(
    make_plugin: MakePlugin, install: Callable[..., object], ctx: object
) -> None:
    source = "from mm_engine.plugins import hookimpl\n@hookimpl\ndef max_tokens(): return 7"
    install("mm-other", files={"mm_other.py": source})
    assert make_plugin("from mm_other import max_tokens").max_tokens(ctx, "image") == 7
