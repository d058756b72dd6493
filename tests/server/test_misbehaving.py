"""A plugin that breaks its contract, in the real server: refused at startup, or one 500.

The catalogue of all such plugins runs in tests/plugins/test_misbehaving.py in one process. Here
are those that could end a process, hold up its loop, or be lost between the two processes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import forking
from pictures import data_url, encode, quarters
from serving import ENGINE, ServerProcess, environment, wait_until
from wrong_plugins import WRONG_PLUGINS, edited, end_hanging

HOOK_TIMEOUT = 3.0  # seconds
NEIGHBOUR_TOKENS = 400  # so many that a late look still sees them come
MAX_INPUT_THREADS = 4  # that a server keeps for a while; there is one at least
#: The width of an image in pixels -> where a statement is put in, its code, what is blamed, why.
FAULTS = {
    51: ("input_processor", "hang()", "input_processor", "took longer than 3 s"),
    52: ("input_processor", "raise SystemExit(3)", "input_processor", "raised SystemExit."),
    53: ("input_processor", "counts[0] -= 1", "embed_images", "expected shape [15, 64] for"),
    54: (
        "to_tensors",
        "raise KeyboardInterrupt",
        "register_input_mapper",
        "raised KeyboardInterrupt.",
    ),
    55: ("to_tensors", "hang()", "register_input_mapper", "took longer than 3 s"),
    56: ("to_tensors", "image.thumbnail((9, 9))", "register_input_mapper", "got it modified"),
    57: ("embed_images", "rows[0] = rows[0] * float('nan')", "embed_images", "got NaN or inf"),
    58: ("embed_images", "raise SystemExit(3)", "embed_images", "raised SystemExit."),
    59: ("embed_images", "raise KeyboardInterrupt", "embed_images", "raised KeyboardInterrupt."),
    61: (
        "to_tensors",
        "raise ValueError('/root/secret hunter2')",
        "register_input_mapper",
        "raised ValueError.",
    ),
    62: (
        "embed_images",
        "raise ValueError('/root/secret hunter2')",
        "embed_images",
        "raised ValueError.",
    ),
    63: (
        "input_processor",
        "inputs.mapped['image'][0]['pixel_values'].numpy()[:] = 0",
        "input_processor",
        "expected the given inputs unchanged",
    ),
    64: (
        "input_processor",
        "inputs.mapped['image'][0]['pixel_values'].data.neg_()",
        "input_processor",
        "expected the given inputs unchanged",
    ),
    65: (
        "to_tensors",
        "ctx.hf_config.image_token_index = 5",
        "register_input_mapper",
        "expected ctx.hf_config unchanged, got another image_token_index",
    ),
    66: (
        "input_processor",
        "ctx.hf_config.text_config.vocab_size = 5",
        "input_processor",
        "expected ctx.hf_config unchanged, got another vocab_size",
    ),
    67: ("to_tensors", "ctx.limits['image'] = 0", "register_input_mapper", "raised TypeError."),
    68: ("input_processor", "counts[0] = 10**9", "input_processor", "raised ValueError."),
    69: (
        "embed_images",
        "rows[0] = rows[0].to_sparse()",
        "embed_images",
        "expected a dense tensor",
    ),
    70: (
        "to_tensors",
        "raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})",
        "register_input_mapper",
        "raised Odd.",
    ),
    71: (
        "embed_images",
        "rows[0] = rows[0].to('meta')",  # a device that every machine has beside the CPU
        "embed_images",
        "expected device cpu for image 0, got meta",
    ),
    72: (
        "embed_images",
        "rows[0] = rows[0].double()",
        "embed_images",
        "expected dtype float32 for image 0, got float64",
    ),
    73: (
        "embed_images",
        "rows[0] = rows[0][None]",
        "embed_images",
        "expected shape [16, 64] for image 0 (16 placeholder tokens, by input_processor), got "
        "[1, 16, 64]",
    ),
    60: ("embed_images", "rows[0] = rows[0][:, 1:]", "embed_images", "got [16, 63]"),
}
WIDTHS = {
    "input_processor": "images[0].width",
    "to_tensors": "image.width",
    "embed_images": "int(width[0])",
}


def faulty_plugin() -> str:
    """The right plugin, with all of `FAULTS`."""
    edits = []
    for mark, width in WIDTHS.items():
        indent = " " * (4 if mark == "input_processor" else 8)
        lines = [
            f"{indent}if {width} == {number}: {code}\n"
            for number, (at, code, _, _) in FAULTS.items()
            if at == mark
        ]
        edits.append((f"{indent}# {mark}\n", "".join(lines)))
    ends = "        if marked.sum() > 4: raise SystemExit(3)\n"  # a random model writes some @ too
    return edited(*edits, ("        # forward\n", ends))


@pytest.fixture(scope="module")
def faulty(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("faulty")
    plugin = folder / "faulty.py"
    plugin.write_text(faulty_plugin())
    flags = (
        *(str(llava), "--plugin", str(plugin), "--hook-timeout", str(HOOK_TIMEOUT)),
        *("--kv-cache-memory", "32MiB"),
    )
    with ServerProcess(folder, *flags) as server:
        yield server


def ask(server: ServerProcess, width: int, *, text: str = "What?", **fields: Any) -> httpx.Response:
    image = {"type": "image_url", "image_url": {"url": data_url(encode(quarters(width, 30)))}}
    content = [image, {"type": "text", "text": text}]
    body = {
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 4,
        "ignore_eos": True,
        **fields,
    }
    return server.http.post("/v1/chat/completions", json=body)


def answer(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def assert_one_500(response: httpx.Response, hook: str, fact: str) -> None:
    assert response.status_code == 500
    error = response.json()["error"]
    assert error["type"] == "plugin_error"
    assert error["message"].startswith("faulty.py sha256:")
    assert f" · {hook} (faulty.py:" in error["message"]
    assert fact in error["message"]


@pytest.fixture(scope="module")
def alone(faulty: ServerProcess) -> list[str]:
    """What the neighbours are told when nobody else asks."""
    return [answer(ask(faulty, width, max_tokens=NEIGHBOUR_TOKENS)) for width in (30, 40)]


def num_threads(server: ServerProcess) -> int:
    pids = (server.process.pid, *server.children)
    return sum(psutil.Process(pid).num_threads() for pid in pids)


@contextmanager
def hanging_ends(server: ServerProcess) -> Iterator[None]:
    """What hangs in the plugin doesn't outlast this. Nothing is waited for."""
    file = server.log.with_name("faulty.py")
    try:
        yield
    finally:
        num_with_those_that_hang = num_threads(server)
        end_hanging(file)
        wait_until(lambda: num_threads(server) < num_with_those_that_hang, "the hook to end")
        Path(f"{file}.end").unlink()


@pytest.fixture(scope="module")
def most_threads(faulty: ServerProcess, alone: list[str]) -> int:
    """How many there can be when nobody asks and nothing is left behind."""
    assert alone
    wait_until(lambda: faulty.is_idle, "the first answers to end")
    return num_threads(faulty) + MAX_INPUT_THREADS - 1


@pytest.mark.parametrize("width", FAULTS)
def test_a_fault_costs_its_request_only(
    faulty: ServerProcess, alone: list[str], most_threads: int, width: int
) -> None:
    _, code, hook, fact = FAULTS[width]
    ends = hanging_ends(faulty) if code == "hang()" else nullcontext()
    with ends, ThreadPoolExecutor(3) as threads:
        neighbours = [threads.submit(ask, faulty, w, max_tokens=NEIGHBOUR_TOKENS) for w in (30, 40)]
        wait_until(
            lambda: faulty.metric("mm_engine_num_requests_running") >= 1, "the neighbours to run"
        )
        failed = threads.submit(ask, faulty, width).result()  # what hangs still does, then
        answers = [answer(neighbour.result()) for neighbour in neighbours]
        wait_until(lambda: faulty.is_idle, "all given back")
    assert_one_500(failed, hook, fact)
    assert answers == alone
    assert answer(ask(faulty, 30, max_tokens=NEIGHBOUR_TOKENS)) == alone[0]
    wait_until(lambda: faulty.is_idle and num_threads(faulty) <= most_threads, "no thread is left")
    assert faulty.http.get("/health").status_code == 200
    assert all(psutil.pid_exists(pid) for pid in faulty.children)
    assert "Traceback" not in faulty.output
    assert failed.json()["error"]["message"] in faulty.output, "the operator is told, too"
    assert "hunter2" not in failed.text + faulty.output


def test_a_model_that_exits_costs_its_request_only(faulty: ServerProcess, alone: list[str]) -> None:
    with ThreadPoolExecutor(2) as threads:
        neighbour = threads.submit(ask, faulty, 40, max_tokens=NEIGHBOUR_TOKENS)
        wait_until(
            lambda: faulty.metric("mm_engine_num_requests_running") >= 1, "the neighbour to run"
        )
        failed = threads.submit(ask, faulty, 30, text="@@@@@").result()
        assert answer(neighbour.result()) == alone[1]
    assert_one_500(failed, "forward", "raised SystemExit.")
    assert answer(ask(faulty, 30, max_tokens=NEIGHBOUR_TOKENS)) == alone[0]


@pytest.mark.parametrize("width", [51, 58])
def test_a_stream_that_a_plugin_fails_never_begins_with_200(
    faulty: ServerProcess, width: int
) -> None:
    with hanging_ends(faulty) if FAULTS[width][1] == "hang()" else nullcontext():
        response = ask(faulty, width, stream=True)
    assert_one_500(response, *FAULTS[width][2:])


@pytest.mark.parametrize(
    "name",
    [
        "processor-one-too-many",
        "processor-hangs",
        "mapper-interrupts",
        "rows-with-nan",
        "rows-on-meta",
        "encoder-exits",
        "encoder-interrupts",
        "forward-interrupts",
        "init-exits",
        "hook-misspelt",
        "import-exits",
    ],
)
def test_startup_is_refused_in_one_line_with_exit_code_1(
    llava: Path, tmp_path: Path, name: str
) -> None:
    plugin = WRONG_PLUGINS[name]
    (tmp_path / "tmp").mkdir()
    flags = ("--port", "0", "--hook-timeout", "2", "--plugin", plugin.write(tmp_path))
    done = forking.run(
        [ENGINE, "serve", str(llava), *map(str, flags)],
        env=environment(tmp_path / "tmp"),
        timeout=100,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    said = [
        line
        for line in done.stderr.splitlines()
        if not line.startswith("Loading weights") and "]: Attention: " not in line
    ]
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert (f" · {plugin.hook} (" if plugin.hook else "import_exits.py") in said[0]
    assert re.search(plugin.fact, said[0])
    assert list((tmp_path / "tmp").iterdir()) == []
