"""All that is public, in one list, and what of it a plugin or a program can rely on.

Within one minor version things may be added; nothing is taken away or changed. `describe` writes
the contract down, one fact a line; a test compares that with what was recorded.

    python -m mm_engine.contract            print it
    python -m mm_engine.contract --record   write tests/contract/snapshot.txt (make contract)
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
import typing
from collections.abc import Callable, Collection, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

#: Modules of which every name in `__all__` is public.
MODULES = ("mm_engine", "mm_engine.plugins", "mm_engine.models", "mm_engine.testing")
#: Other public things: the options of `LLM`, what its calls take and give, what they raise.
NAMES = (
    "mm_engine.config.EngineConfig",
    "mm_engine.errors.EngineDead",
    "mm_engine.errors.MMEngineError",
    "mm_engine.errors.Overloaded",
    "mm_engine.errors.PluginError",
    "mm_engine.llm.Prompt",
    "mm_engine.outputs.ErrorInfo",
    "mm_engine.outputs.Logprob",
)
#: The module with the hooks.
HOOKS = "mm_engine.plugins.hookspecs"
#: Fixtures of the pytest plugin, for the tests of a model's package.
FIXTURES = ("mm_engine.testing.pytest_plugin.plugin_check",)
#: Groups of entry points: what a distribution declares in its pyproject.toml.
ENTRY_POINTS = {
    "mm_engine.plugins": "architecture = module with the hooks",
    "mm_engine.demos": "name = package folder with a checkpoint",
    "mm_engine.test_configs": "architecture = package folder with a small config",
}
#: Classes that only mm-engine makes: a new field without a default breaks nobody.
MADE_BY_US = ("mm_engine.plugins.ModelContext",)

SNAPSHOT = Path("tests", "contract", "snapshot.txt")
Facts = dict[str, str]  # `field mm_engine.plugins.PromptInputs.prompt` -> `1, str | None = None`


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """What became of a recorded contract. What is new and harmless is `added`."""

    broken: tuple[str, ...]
    added: tuple[str, ...]

    def message(self, version: str, recorded_version: str) -> str | None:
        """Say what there is to do, or None if the contract is as recorded."""
        if not self.broken and not self.added:
            return None
        listed = "\n".join(f"  {line}" for line in (*self.broken, *self.added))
        if self.broken and version == recorded_version:
            return (
                f"The contract of {version} is broken: what was made for it may stop working.\n"
                f"{listed}\n"
                "Take the change back; or retire the old name first (mm_engine/plugins/retired.py),"
                " raise the minor version in pyproject.toml, say it in CHANGELOG.md, and run "
                "`make contract`."
            )
        what = f"from {recorded_version} to {version}" if self.broken else "by additions"
        return f"The contract changed {what}. Record it: make contract.\n{listed}"


def contract_version() -> str:
    """Return the version of the contract: mm-engine's without its last part, `0.1`."""
    major, minor, *_ = metadata.version("mm-engine").split(".")
    return f"{major}.{minor}"


def describe() -> Facts:
    """Return every fact of the contract as it is now, in order."""
    facts: Facts = {}
    for group, meaning in ENTRY_POINTS.items():
        facts[f"entry points {group}"] = meaning
    specs = importlib.import_module(HOOKS)
    required = importlib.import_module("mm_engine.plugins.registration").REQUIRED
    facts.update(facts_of_hooks(specs, required))
    for name in ("Mapper", "Register"):
        takes, gives = typing.get_args(getattr(specs, name))
        facts[f"callable {name}"] = f"({', '.join(map(_text, takes))}) -> {_text(gives)}"
    for module in MODULES:
        imported = importlib.import_module(module)
        for name in sorted(imported.__all__):
            facts.update(facts_of(f"{module}.{name}", getattr(imported, name)))
    for path in NAMES:
        facts.update(facts_of(path, _imported(path)))
    for path in FIXTURES:
        facts[f"fixture {path}"] = _imported(path).__name__
    return facts


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def compare(recorded: Facts, now: Facts) -> Difference:
    """Return what is broken, and what was only added; each as a line of a diff."""
    broken: list[str] = []
    added: list[str] = []
    for name, fact in recorded.items():
        retired = now.get(f"property {name.partition(' ')[2]}", "")
        if name not in now and retired.startswith("retired, "):  # a `RetiredField` in its place
            added.append(f"! {name}: {fact}  ->  {retired}")
        elif name not in now:
            broken.append(f"- {name}: {fact}")
    for name, fact in now.items():
        if name not in recorded:
            (broken if _must_be_given(name, fact, recorded) else added).append(f"+ {name}: {fact}")
        elif fact != recorded[name]:
            # To retire a thing is to announce a change, not to make it.
            harmless = fact.startswith(f"{recorded[name]}, retired since ")
            harmless |= _is_ours(name) and _by_name(fact) == _by_name(recorded[name])
            line = f"! {name}: {recorded[name]}  ->  {fact}"
            (added if harmless else broken).append(line)
    return Difference(tuple(broken), tuple(added))


def write(facts: Facts, version: str) -> str:
    """Return the text of a snapshot."""
    lines = [f"version: {version}", *(f"{name}: {fact}" for name, fact in facts.items())]
    return "\n".join(lines) + "\n"


def read(text: str) -> tuple[str, Facts]:
    """Return the version and the facts of a snapshot's text."""
    pairs = [line.partition(": ")[::2] for line in text.splitlines()]
    (_, version), *facts = pairs
    return version, dict(facts)


def facts_of_hooks(specs: Any, required: Collection[str] = ()) -> Facts:
    """Return the facts of the hooks that a module specifies."""
    facts: Facts = {}
    for name, function in vars(specs).items():
        options = getattr(function, f"{specs.PROJECT}_spec", None)
        if options is None:
            continue
        retired = options["warn_on_impl_args"] or {}
        notice = options["warn_on_impl"]
        hook = f"hook {name}"
        returned = inspect.signature(function).return_annotation
        must = "required " if name in required else ""
        facts[hook] = f"{must}-> {returned}{_retired(notice)}"
        for parameter in inspect.signature(function).parameters.values():
            notice = retired.get(parameter.name)
            facts[f"{hook}({parameter.name})"] = f"{parameter.annotation}{_retired(notice)}"
    return facts


def facts_of(path: str, thing: Any) -> Facts:
    """Return the facts of one public thing: of a class its bases, fields, methods, attributes."""
    if inspect.isclass(thing):
        return dict(_facts_of_class(path, thing))
    if callable(thing) and inspect.isfunction(thing):
        return dict(_facts_of_function("function", path, thing))
    return {f"value {path}": type(thing).__name__}


def _facts_of_class(path: str, cls: type) -> Iterator[tuple[str, str]]:
    bases = [base.__name__ for base in cls.__mro__[1:] if base not in (object, BaseException)]
    dataclass_options = getattr(cls, "__dataclass_params__", None)
    frozen = ", frozen" if dataclass_options is not None and dataclass_options.frozen else ""
    yield f"class {path}", f"({', '.join(bases)}){frozen}"
    fields = {f.name: f for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    for number, field in enumerate(fields.values(), 1):
        yield f"field {path}.{field.name}", _fact_of_field(number, field)
    if not fields and "__init__" in vars(cls):
        init = vars(cls)["__init__"]
        yield from _facts_of_function("method", f"{path}.__init__", init, skip=1)
    for name, kind in inspect.get_annotations(cls).items():
        if not name.startswith("_") and name not in fields:
            yield f"attribute {path}.{name}", _text(kind)
    for name, value in vars(cls).items():
        if name.startswith("_") or name in fields:
            continue
        if isinstance(value, property):
            read: Any = value.fget
            yield f"property {path}.{name}", _text(inspect.signature(read).return_annotation)
        elif isinstance(value, staticmethod | classmethod) or inspect.isfunction(value):
            skip = 0 if isinstance(value, staticmethod) else 1
            function: Any = value
            function = getattr(function, "__func__", function)
            yield from _facts_of_function("method", f"{path}.{name}", function, skip=skip)
        elif isinstance(value, int | str):
            yield f"attribute {path}.{name}", repr(value)
        elif hasattr(value, "notice"):
            yield f"property {path}.{name}", f"retired{_retired(value.notice)}"


def _facts_of_function(
    kind: str, path: str, function: Callable[..., Any], *, skip: int = 0
) -> Iterator[tuple[str, str]]:
    signature = inspect.signature(function)
    yield f"{kind} {path}", f"-> {_text(signature.return_annotation)}"
    for number, parameter in enumerate(list(signature.parameters.values())[skip:], 1):
        place = {
            inspect.Parameter.POSITIONAL_ONLY: f"{number} without name",
            inspect.Parameter.POSITIONAL_OR_KEYWORD: str(number),
            inspect.Parameter.VAR_POSITIONAL: "*",
            inspect.Parameter.KEYWORD_ONLY: "by name",
            inspect.Parameter.VAR_KEYWORD: "**",
        }[parameter.kind]
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        yield f"{kind} {path}({parameter.name})", f"{place}, {_text(parameter.annotation)}{default}"


def _fact_of_field(number: int, field: dataclasses.Field[Any]) -> str:
    default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
    if field.default_factory is not dataclasses.MISSING:
        default = f" = {field.default_factory()!r}"
    return f"{'by name' if field.kw_only else number}, {_text(field.type)}{default}"


def _text(annotation: Any) -> str:
    """The annotation as it is written in the source, where annotations are kept as text."""
    if annotation is inspect.Parameter.empty:
        return "anything"
    written = (
        annotation if isinstance(annotation, str) else getattr(annotation, "__forward_arg__", "")
    )
    return re.sub(r"\s+", " ", written or getattr(annotation, "__name__", str(annotation)))


def _retired(notice: Any) -> str:
    if notice is None:
        return ""
    return f", retired since {notice.since}, gone in {notice.gone_in}: use {notice.instead}"


def _must_be_given(name: str, fact: str, recorded: Facts) -> bool:
    """Say whether what is new must be given by callers who were there before it."""
    kind, _, path = name.partition(" ")
    if kind == "field":
        known = f"class {path.rpartition('.')[0]}" in recorded and not _is_ours(name)
    elif kind == "hook" and not name.endswith(")"):
        return fact.startswith("required ")
    else:
        known = kind in ("function", "method") and name.endswith(")")
        known = known and name.partition("(")[0] in recorded
    return known and " = " not in fact and not fact.startswith("*")


def _is_ours(name: str) -> bool:
    """Say whether it is a field of a class that only mm-engine makes."""
    kind, _, path = name.partition(" ")
    return kind == "field" and path.rpartition(".")[0] in MADE_BY_US


def _by_name(fact: str) -> str:
    """The fact of a field without its place among the others."""
    return fact.partition(", ")[2]


def main(arguments: list[str]) -> int:
    """Print the contract, or record it; returns the exit code."""
    version, facts = contract_version(), describe()
    if arguments != ["--record"]:
        sys.stdout.write(write(facts, version))
        return 0
    if SNAPSHOT.exists():
        recorded_version, recorded = read(SNAPSHOT.read_text("utf-8"))
        difference = compare(recorded, facts)
        if difference.broken and version == recorded_version:
            sys.stderr.write(f"{difference.message(version, recorded_version)}\n")
            return 1
    SNAPSHOT.parent.mkdir(parents=True, exist_ok=True)
    SNAPSHOT.write_text(write(facts, version), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
