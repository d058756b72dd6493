"""The shape that every file keeps: imports run downward, no model is named, files stay small."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = ROOT / "core" / "mm_engine"
KERNELS = ROOT / "kernels" / "mm_engine_kernels"

#: From top to bottom. What stands on one line doesn't know its neighbours.
LAYERS = (
    {"cli"},
    {"server", "testing", "llm"},
    {"inputs", "engine"},
    {"worker"},
    {"plugins", "models"},
    {"attention"},
)
#: `contract` is none; it imports what it describes, by the names that it lists, when it is run.
NOUNS = {
    "config",
    "contract",
    "errors",
    "light_imports",
    "log",
    "outputs",
    "processes",
    "request",
    "sampling_params",
    "sequence",
    "torch_threads",
}
DEPTH = {name: depth for depth, layer in enumerate(LAYERS) for name in layer}

#: A part of a name or a word in a comment, in any spelling: LlavaConfig, llava_next, "CLIP".
FAMILIES = (
    "bert|blip|clip|deepseek|falcon|fuyu|gemma|gemma[0-9]|gpt|idefics|internvl|llama|llava|minicpm|"
    "mistral|mixtral|molmo|paligemma|phi|pixtral|qwen|qwen[0-9]|siglip|smolvlm|vicuna"
)
FAMILY = re.compile(rf"(?<![a-z])(?:{FAMILIES})(?:v?[0-9.]*)(?![a-z(])", re.IGNORECASE)
#: `clip` is also a verb; `llama3` is what transformers calls a formula of rotary embeddings.
NOT_FAMILIES = re.compile(r'would clip it|"llama3"|, llama3\.')


def python_files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports_of(path: Path, package: Path) -> Iterator[str]:
    """Dotted names that the file imports, at its top or inside of a function."""
    parents = path.relative_to(package.parent).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(parents[: len(parents) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def faults_of_imports(part: str, imported: str) -> str | None:
    """Say why the part of core (a folder or file) may not import a name, or None if it may."""
    package, _, rest = imported.partition(".")
    target = rest.partition(".")[0]
    if package == "mm_engine":
        if target in NOUNS or target == part:
            return None
        if part in NOUNS:
            return f"a noun imports {imported}"
        if target not in DEPTH:  # the façade, mm_engine itself
            return None if part == "cli" else f"{part} imports the façade: {imported}"
        if DEPTH[target] <= DEPTH[part]:
            return f"{part} imports {imported}, which isn't below it"
    elif package.startswith("mm_") and package != "mm_engine_kernels":
        return f"core imports a plugin: {imported}"
    return None


@pytest.mark.parametrize("path", python_files(CORE), ids=name_of)
def test_imports_run_downward(path: Path) -> None:
    part = path.relative_to(CORE).parts[0].removesuffix(".py")
    if part == "__init__":  # the façade sees everything
        return
    assert part in DEPTH or part in NOUNS, f"{part} has no place in LAYERS"
    found = [faults_of_imports(part, imported) for imported in imports_of(path, CORE)]
    assert [fault for fault in found if fault] == []


@pytest.mark.parametrize(
    ("part", "imported", "allowed"),
    [
        ("cli", "mm_engine.server.app.make", True),
        ("cli", "mm_engine.LLM", True),
        ("server", "mm_engine.inputs.pipeline", True),
        ("engine", "mm_engine.errors.RequestError", True),
        ("models", "mm_engine_kernels.reference", True),
        ("server", "mm_engine.llm.LLM", False),
        ("server", "mm_engine.LLM", False),
        ("inputs", "mm_engine.engine.client", False),
        ("engine", "mm_engine.inputs.pipeline", False),
        ("worker", "mm_engine.engine.scheduler", False),
        ("plugins", "mm_engine.models.weights", False),
        ("config", "mm_engine.plugins.record", False),
        ("models", "mm_llava.plugin", False),
    ],
)
def test_the_import_rule_itself(part: str, imported: str, allowed: bool) -> None:
    assert (faults_of_imports(part, imported) is None) == allowed


@pytest.mark.parametrize("path", python_files(KERNELS), ids=name_of)
def test_kernels_know_nothing_of_the_engine(path: Path) -> None:
    packages = {imported.partition(".")[0] for imported in imports_of(path, KERNELS)}
    assert {name for name in packages if name.startswith("mm_")} <= {"mm_engine_kernels"}


def plugin_files() -> list[Path]:
    packages = [file.parent / file.parent.name for file in ROOT.glob("plugins/*/pyproject.toml")]
    return python_files(*packages)


@pytest.mark.parametrize("path", plugin_files(), ids=name_of)
def test_plugins_import_documented_names_only(path: Path) -> None:
    documented = {
        f"mm_engine.{part}.{name}"
        for part in ("plugins", "models", "testing")
        for name in exported_by(CORE / part / "__init__.py")
    }
    used = {name for name in imports_of(path, path.parent) if name.startswith("mm_engine")}
    assert used - documented == set()


def exported_by(path: Path) -> list[str]:
    if not path.exists():
        return []
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return []


@pytest.mark.parametrize("path", python_files(CORE, KERNELS), ids=name_of)
def test_no_model_family_is_named(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    found = [line.strip() for line in lines if names_a_family(line)]
    assert found == []
    assert not names_a_family(path.name)


def names_a_family(text: str) -> bool:
    text = re.sub(r"([a-z])([A-Z])", r"\1 \2", NOT_FAMILIES.sub("", text))
    return FAMILY.search(text.replace("_", " ")) is not None


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("class LlavaForConditionalGeneration:", True),
        ("from mm_llava import plugin", True),
        ("# as in CLIP's towers", True),
        ('if model_type == "clip_vision_model":', True),
        ("SiglipVisionModel", True),
        ("a Llama-family decoder", True),
        ("Qwen2Config", True),
        ("qwen2_vl", True),
        ("mistral", True),
        ("np.clip(samples, 0, 1)", False),
        ("graphics, philosophy, clipped, eclipse", False),
        ('elif kind in ("linear", "yarn", "llama3"):', False),
    ],
)
def test_the_naming_rule_itself(text: str, named: bool) -> None:
    assert names_a_family(text) == named


EVERYWHERE = python_files(
    CORE, KERNELS, ROOT / "plugins", ROOT / "tests", ROOT / "benchmarks", ROOT / "training"
)


@pytest.mark.parametrize("path", EVERYWHERE, ids=name_of)
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 400


@pytest.mark.parametrize("path", [*python_files(CORE, KERNELS), *plugin_files()], ids=name_of)
def test_public_things_have_docstrings(path: Path) -> None:
    assert list(undocumented(ast.parse(path.read_text("utf-8")))) == []


def undocumented(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str = "module"
) -> Iterator[str]:
    """Names of public things without a docstring; an `__init__` is described by its class."""
    if ast.get_docstring(node) is None:
        yield name
    if isinstance(node, ast.Module | ast.ClassDef):
        for inner in node.body:
            public = isinstance(
                inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            ) and not inner.name.startswith("_")
            if public:
                yield from undocumented(inner, inner.name)


@pytest.mark.parametrize("folder", ["core", "kernels"])
def test_top_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()
