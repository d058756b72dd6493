"""What the README shows works."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from checkpoints import make_llava
from mm_engine import LLM, SamplingParams
from parity import picture
from serving import ENGINE, ServerProcess

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
RECORD = ROOT / "benchmarks" / "results" / "cpu-epyc-2-cores.json"


def test_the_plugin_on_one_screen_serves_a_model(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(# mm_foo/plugin.py\n.*?)```", README, re.DOTALL)
    assert len(blocks) == 1
    plugin = tmp_path / "plugin.py"
    plugin.write_text(blocks[0])
    checkpoint = make_llava(tmp_path / "checkpoint", tower="siglip")
    config = json.loads((checkpoint / "config.json").read_text())
    config["architectures"] = ["FooForConditionalGeneration"]
    (checkpoint / "config.json").write_text(json.dumps(config))

    llm = LLM(str(checkpoint), plugins=(str(plugin),), load_format="dummy", progress=False)
    prompt = {"prompt": "USER: <image> what?", "multi_modal_data": {"image": picture(1)}}
    (output,) = llm.generate([prompt], SamplingParams(max_tokens=5, ignore_eos=True))

    assert output.error is None
    assert len(output.outputs[0].token_ids) == 5
    assert output.prompt_token_ids.count(llm.pipeline._placeholder) == 16


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """What `make serve` runs, on another port."""
    with ServerProcess(tmp_path_factory.mktemp("served")) as started:
        yield started


PORT = "http://127.0.0.1:8123"


def test_the_question_in_python_has_the_answer_that_is_shown(made: ServerProcess) -> None:
    (code,) = re.findall(r"```python\n(import base64\n.*?)```", README, re.DOTALL)
    assert PORT in code
    done = subprocess.run(
        [sys.executable, "-c", code.replace(PORT, made.url)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=True,
    )
    assert code.splitlines()[-1] == f"# {done.stdout.strip()}"


def test_the_conversation_has_the_answers_that_are_shown(made: ServerProcess) -> None:
    (block,) = re.findall(r"```console\n\$ (engine chat --url .*?)```", README, re.DOTALL)
    command, *lines = block.splitlines()
    typed = [line.removeprefix("> ") for line in lines if line.startswith("> ")]
    shown = [line for line in lines if not line.startswith("> ")]
    assert len(typed) > len(shown) > 1 and PORT in command
    done = subprocess.run(
        [ENGINE, *shlex.split(command.replace(PORT, made.url))[1:]],
        input="\n".join(typed),
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=True,
    )
    assert done.stdout.splitlines() == shown


def test_every_file_that_is_linked_exists() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)|src=\"([^\":]+)\"", README)
    assert len(links) > 5
    for pair in links:
        path = next(part for part in pair if part)
        assert (ROOT / path).exists(), path


def table() -> ModuleType:
    """The script that writes the tables of figures."""
    spec = importlib.util.spec_from_file_location("table", ROOT / "benchmarks" / "table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as it is when it runs as a script
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return module


def figure() -> str:
    """One of a record, as the table has it."""
    ratio: float = json.loads(RECORD.read_text())["rows"][-1]["ratio"]
    return f"**{ratio:.2f}×**"


def test_the_figures_are_those_on_record() -> None:
    assert table().updated(README) == README, "README.md is behind the records: run `make docs`"
    assert figure() in table().tables()


def test_records_of_other_benchmarks_make_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = table()
    (tmp_path / "a.json").write_text(RECORD.read_text())
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    alone = module.tables()
    assert figure() in alone  # the control
    others = [
        {"figures": {}},
        {"benchmark": "gpu"},
        {"rows": []},
        {"rows": [{"queue": 1}]},
        {"rows": [1]},
        [1],
        None,
    ]
    for number, other in enumerate(others):
        (tmp_path / f"b{number}.json").write_text(json.dumps(other))
    assert module.tables() == alone


@pytest.mark.parametrize(
    ("dtype", "others"),
    [
        ("float32", ["transformers", "vLLM", "llama.cpp"]),
        ("bfloat16", ["transformers", "vLLM", "llama.cpp"]),
    ],
)
def test_engines_that_were_measured_together_stand_side_by_side(
    dtype: str, others: list[str]
) -> None:
    record = json.loads((RECORD.parent / f"cpu-peers-{dtype}.json").read_text())
    rows = {row["key"]: row for part in record["sections"].values() for row in part["rows"]}
    row = rows["decode 8"]
    ours = row["medians"]["mm-engine"]
    lines = README.splitlines()
    start = f"| {row['name']} | **{table().figure(ours, 'tokens/s')}** |"
    (line,) = (line for line in lines if line.startswith(start))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert lines[lines.index(line) - 5] == f"| | mm-engine | {' | '.join(others)} | floor |"
    for place, name in enumerate(others):
        theirs = row["medians"][name]
        assert row["ratios"][name] == pytest.approx(ours / theirs)
        assert cells[2 + place] == f"{theirs:.3g} tokens/s ({ours / theirs:.2f}×)"
    assert "a token after" not in README and "logit error" not in README


def test_a_figure_that_is_changed_by_hand_does_not_stay() -> None:
    changed = README.replace(figure(), "**99.99×**")
    assert changed != README == table().updated(changed)
