"""The public contract is the recorded one; a break is told from an addition."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy
import pytest

from mm_engine import contract
from mm_engine.contract import compare, contract_version, describe, facts_of, facts_of_hooks
from mm_engine.plugins import ModelContext, expand_placeholders, hookspecs
from mm_engine.plugins.retired import Retired, RetiredField

ROOT = Path(__file__).parents[2]
PATH = "mm_engine.plugins.Thing"


def test_contract_is_the_recorded_one() -> None:
    """If this fails: its message says what broke, and what to do."""
    version, recorded = contract.read((ROOT / contract.SNAPSHOT).read_text("utf-8"))
    message = compare(recorded, describe()).message(contract_version(), version)
    assert message is None, message


def test_contract_lists_what_the_documents_name() -> None:
    facts = describe()
    for name in (
        *("hook model_class", "hook input_processor(inputs)", "callable Mapper"),
        *("entry points mm_engine.plugins", "entry points mm_engine.test_configs"),
        "function mm_engine.plugins.expand_placeholders(token_id)",
        "field mm_engine.plugins.ModelContext.max_model_len",
        "field mm_engine.plugins.PromptInputs.mapped",
        "field mm_engine.plugins.PlaceholderRange.offset",
        "method mm_engine.models.SupportsVision.forward(inputs_embeds)",
        "attribute mm_engine.models.SupportsVision.embed_images",
        "function mm_engine.models.build_decoder(ctx)",
        "function mm_engine.models.build_vision_tower(upto_layer)",
        "function mm_engine.testing.check_plugin(model)",
        "method mm_engine.LLM.generate(sampling_params)",
        "field mm_engine.SamplingParams.temperature",
        "attribute mm_engine.errors.EngineDead.status",
    ):
        assert name in facts, name
    assert facts["field mm_engine.SamplingParams.temperature"] == "by name, float = 1.0"


def specs(signature: str, **options: Any) -> ModuleType:
    """A module of the test's own with one hook, `hook`."""
    module: Any = ModuleType("specs")
    module.PROJECT = "mm_engine"
    exec(f"def hook{signature}: ...", vars(module))
    pluggy.HookspecMarker("mm_engine")(firstresult=True, **options)(module.hook)
    return module


@dataclasses.dataclass(frozen=True)
class Fields:
    first: int
    second: str = "a"


@dataclasses.dataclass(frozen=True)
class Renamed:
    first: int
    third: str = "a"


@dataclasses.dataclass(frozen=True)
class OtherDefault:
    first: int
    second: str = "b"


@dataclasses.dataclass
class NotFrozen:
    first: int
    second: str = "a"


@dataclasses.dataclass(frozen=True)
class OneMore:
    first: int
    second: str = "a"
    third: str = "c"


@dataclasses.dataclass(frozen=True)
class OneMoreToGive:
    first: int
    second: str = "a"
    third: str = dataclasses.field(kw_only=True)


def of_function(source: str) -> contract.Facts:
    names: dict[str, Any] = {}
    exec(f"from __future__ import annotations\ndef thing{source}: ...", names)
    return facts_of(PATH, names["thing"])


OLD_HOOK = "(ctx: Context, seq_len: int) -> int"
BREAKS = {
    "hook argument removed": (
        facts_of_hooks(specs(OLD_HOOK)),
        facts_of_hooks(specs("(ctx: Context) -> int")),
        "- hook hook(seq_len): int",
    ),
    "hook argument of another type": (
        facts_of_hooks(specs(OLD_HOOK)),
        facts_of_hooks(specs("(ctx: Context, seq_len: str) -> int")),
        "! hook hook(seq_len): int  ->  str",
    ),
    "hook of another result": (
        facts_of_hooks(specs(OLD_HOOK)),
        facts_of_hooks(specs(OLD_HOOK.replace("-> int", "-> str"))),
        "! hook hook: -> int  ->  -> str",
    ),
    "hook required": (
        facts_of_hooks(specs(OLD_HOOK)),
        facts_of_hooks(specs(OLD_HOOK), required=["hook"]),
        "! hook hook: -> int  ->  required -> int",
    ),
    "new hook required": (
        {},
        facts_of_hooks(specs(OLD_HOOK), required=["hook"]),
        "+ hook hook: required -> int",
    ),
    "field renamed": (
        facts_of(PATH, Fields),
        facts_of(PATH, Renamed),
        f"- field {PATH}.second: 2, str = 'a'",
    ),
    "default changed": (
        facts_of(PATH, Fields),
        facts_of(PATH, OtherDefault),
        f"! field {PATH}.second: 2, str = 'a'  ->  2, str = 'b'",
    ),
    "not frozen any more": (
        facts_of(PATH, Fields),
        facts_of(PATH, NotFrozen),
        f"! class {PATH}: (), frozen  ->  ()",
    ),
    "field that must be given": (
        facts_of(PATH, Fields),
        facts_of(PATH, OneMoreToGive),
        f"+ field {PATH}.third: by name, str",
    ),
    "argument that must be given": (
        of_function("(a: int) -> int"),
        of_function("(a: int, b: int) -> int"),
        f"+ function {PATH}(b): 2, int",
    ),
    "argument by name only": (
        of_function("(a: int, b: int = 1) -> int"),
        of_function("(a: int, *, b: int = 1) -> int"),
        f"! function {PATH}(b): 2, int = 1  ->  by name, int = 1",
    ),
    "arguments swapped": (
        of_function("(a: int, b: int) -> int"),
        of_function("(b: int, a: int) -> int"),
        f"! function {PATH}(a): 1, int  ->  2, int",
    ),
    "default of an argument gone": (
        of_function("(a: int = 1) -> int"),
        of_function("(a: int) -> int"),
        f"! function {PATH}(a): 1, int = 1  ->  1, int",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_break_within_a_version_says_what_broke_and_what_to_do(name: str) -> None:
    recorded, now, line = BREAKS[name]
    assert recorded != now
    difference = compare(recorded, now)
    assert line in difference.broken
    message = difference.message("0.1", "0.1")
    assert message is not None
    assert message.startswith("The contract of 0.1 is broken")
    assert line in message
    assert "raise the minor version" in message and "CHANGELOG.md" in message


@pytest.mark.parametrize("name", BREAKS)
def test_break_with_a_new_minor_version_is_to_be_recorded(name: str) -> None:
    recorded, now, line = BREAKS[name]
    message = compare(recorded, now).message("0.2", "0.1")
    assert message is not None
    assert message.startswith("The contract changed from 0.1 to 0.2. Record it: make contract.")
    assert line in message


NOTICE = Retired(since="0.1", gone_in="0.2", instead="ctx.max_model_len")


@dataclasses.dataclass(frozen=True)
class Retiring:
    first: int
    second = RetiredField(lambda self: "a", NOTICE)


@dataclasses.dataclass(frozen=True)
class RetiringOneMore:
    first: int
    second = RetiredField(lambda self: "a", NOTICE)
    third: str = "c"


ADDITIONS = {
    "hook argument": (
        facts_of_hooks(specs("(ctx: Context) -> int")),
        facts_of_hooks(specs(OLD_HOOK)),
        "+ hook hook(seq_len): int",
    ),
    "field with a default": (
        facts_of(PATH, Fields),
        facts_of(PATH, OneMore),
        f"+ field {PATH}.third: 3, str = 'c'",
    ),
    "field of a class that only we make": (
        facts_of("mm_engine.plugins.ModelContext", Fields),
        facts_of("mm_engine.plugins.ModelContext", OneMoreToGive),
        "+ field mm_engine.plugins.ModelContext.third: by name, str",
    ),
    "argument with a default": (
        of_function("(a: int) -> int"),
        of_function("(a: int, *, b: int = 2) -> int"),
        f"+ function {PATH}(b): by name, int = 2",
    ),
    "new function with arguments": (
        {},
        of_function("(a: int) -> int"),
        f"+ function {PATH}(a): 1, int",
    ),
    "field retired": (
        facts_of(PATH, Fields),
        facts_of(PATH, Retiring),
        f"! field {PATH}.second: 2, str = 'a'  ->  retired, retired since 0.1, gone in 0.2: "
        "use ctx.max_model_len",
    ),
    "field retired before others of a class that only we make": (
        facts_of("mm_engine.plugins.ModelContext", OneMore),
        facts_of("mm_engine.plugins.ModelContext", RetiringOneMore),
        "! field mm_engine.plugins.ModelContext.third: 3, str = 'c'  ->  2, str = 'c'",
    ),
    "argument retired": (
        facts_of_hooks(specs(OLD_HOOK)),
        facts_of_hooks(specs(OLD_HOOK, warn_on_impl_args={"seq_len": NOTICE})),
        "! hook hook(seq_len): int  ->  int, retired since 0.1, gone in 0.2: use ctx.max_model_len",
    ),
    "hook retired": (
        facts_of_hooks(specs(OLD_HOOK)),
        facts_of_hooks(specs(OLD_HOOK, warn_on_impl=NOTICE)),
        "! hook hook: -> int  ->  -> int, retired since 0.1, gone in 0.2: use ctx.max_model_len",
    ),
}


@pytest.mark.parametrize("name", ADDITIONS)
def test_addition_is_to_be_recorded_within_a_version(name: str) -> None:
    recorded, now, line = ADDITIONS[name]
    difference = compare(recorded, now)
    assert difference.broken == ()
    assert line in difference.added
    message = difference.message("0.1", "0.1")
    assert message is not None
    assert message.startswith("The contract changed by additions. Record it: make contract.")
    assert line in message


def test_no_difference_says_nothing() -> None:
    assert compare(describe(), describe()).message("0.1", "0.1") is None


def test_retired_field_is_a_property_of_the_contract() -> None:
    class Context:
        old = RetiredField(lambda self: 3, NOTICE)

    fact = facts_of(PATH, Context)[f"property {PATH}.old"]
    assert fact == "retired, retired since 0.1, gone in 0.2: use ctx.max_model_len"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("def dummy_data(ctx: ModelContext, seq_len: int, counts", "def dummy_data(ctx, counts"),
        ("def max_tokens", "def most_tokens"),
        ("-> type[nn.Module]", "-> nn.Module"),
    ],
)
def test_break_in_the_real_hooks_is_noticed(old: str, new: str) -> None:
    source = inspect.getsource(hookspecs)
    assert source.count(old) == 1
    changed = ModuleType("mm_engine.plugins.hookspecs")
    exec(source.replace(old, new), vars(changed))
    assert compare(facts_of_hooks(hookspecs), facts_of_hooks(changed)).broken


def test_break_in_real_names_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = describe()
    monkeypatch.setattr(expand_placeholders, "__kwdefaults__", {"text": "<image>"})
    monkeypatch.delattr(ModelContext, "text_config")
    monkeypatch.setattr("mm_engine.models.__all__", ["SupportsVision"])
    broken = "\n".join(compare(recorded, describe()).broken)
    assert "(text): by name, str | None = None  ->  by name, str | None = '<image>'" in broken
    assert "- property mm_engine.plugins.ModelContext.text_config" in broken
    assert "- function mm_engine.models.build_decoder:" in broken


def test_recording_refuses_a_break_and_takes_an_addition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    snapshot = tmp_path / contract.SNAPSHOT
    assert contract.main(["--record"]) == 0
    whole = snapshot.read_text("utf-8")
    assert contract.main([]) == 0
    assert capsys.readouterr().out == whole
    snapshot.write_text(whole + "hook that_is_gone: -> int\n")
    assert contract.main(["--record"]) == 1
    said = capsys.readouterr().err
    assert "The contract of" in said and "- hook that_is_gone: -> int" in said
    assert snapshot.read_text("utf-8") != whole
    snapshot.write_text(re.sub(r"hook max_tokens\(modality\).*\n", "", whole))
    assert contract.main(["--record"]) == 0
    assert snapshot.read_text("utf-8") == whole


def test_command_prints_the_contract() -> None:
    command = [sys.executable, "-m", "mm_engine.contract"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert contract.read(done.stdout) == (contract_version(), describe())


def test_snapshot_survives_writing_and_reading() -> None:
    facts = describe()
    assert contract.read(contract.write(facts, "0.7")) == ("0.7", facts)
