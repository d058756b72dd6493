"""The log in JSON: every line of every process, and none of what was said."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import forking
from pictures import data_url, encode, quarters
from serving import ENGINE, FLAGS, KEY, ServerProcess, environment, wait_until

SECRET = "s3cr3t"
#: What the banner's lines begin with, on stdout; the rest is the log.
BANNER = (
    *("model ", "plugin ", "size ", "KV cache ", "address ", "bundled too ", "Try it:"),
    "{ printf ",
)
#: A model whose text backbone fails where a token is repeated, in each rank.
PLUGIN = """
from mm_engine.plugins import hookimpl
from mm_llava.model import LlavaForConditionalGeneration
from mm_llava.plugin import max_tokens

class Faulty(LlavaForConditionalGeneration):
    def forward(self, input_ids, *others, **named):
        if (input_ids == 11).sum() > 20:
            raise RuntimeError("s3cr3t")
        return super().forward(input_ids, *others, **named)

@hookimpl
def model_class(ctx):
    return Faulty
"""


def log_of(text: str) -> list[dict[str, Any]]:
    """The lines of a log, all of which must be objects."""
    lines = [line for line in text.splitlines() if line and not line.startswith(BANNER)]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Two processes that share the model, a faulty plugin, a key; not on a terminal."""
    folder = tmp_path_factory.mktemp("json")
    plugin = folder / "faulty.py"
    plugin.write_text(PLUGIN)
    env = {"MM_ENGINE_API_KEY": KEY, "MM_ENGINE_LOG_FORMAT": ""}
    flags = (*FLAGS, "--plugin", str(plugin), "--tensor-parallel-size", "2")
    with ServerProcess(folder, *flags, env=env) as started:
        started.http.headers["Authorization"] = f"Bearer {KEY}"
        yield started


def access_line(server: ServerProcess, request_id: str) -> dict[str, Any]:
    def found() -> list[dict[str, Any]]:
        lines = log_of(server.output)
        return [
            line
            for line in lines
            if line.get("request_id") == request_id
            and line["logger"] == "mm_engine.server.access_log"
        ]

    wait_until(lambda: bool(found()), "its line in the log")
    (line,) = found()
    return line


def test_an_access_line_has_its_facts_as_fields(server: ServerProcess) -> None:
    picture = {"type": "image_url", "image_url": {"url": data_url(encode(quarters(40, 40)))}}
    content = [picture, {"type": "text", "text": SECRET}]
    body = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 3,
        "ignore_eos": True,
    }
    answer = server.http.post("/v1/chat/completions", json=body, headers={"X-Request-Id": "r-1"})
    usage = answer.json()["usage"]
    line = access_line(server, "r-1")
    moment = datetime.fromisoformat(line.pop("time"))
    assert moment.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - moment) < timedelta(minutes=5)
    assert 0 < line.pop("first_token_seconds") <= line.pop("seconds") < 60
    message = line.pop("message")
    assert message.startswith("POST /v1/chat/completions 200 · ") and message.endswith(" s")
    assert line == {
        "level": "info",
        "logger": "mm_engine.server.access_log",
        "process": "server",
        "pid": server.process.pid,
        "request_id": "r-1",
        "method": "POST",
        "route": "/v1/chat/completions",
        "status": 200,
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": 3,
        "images": 1,
        "finish_reasons": ["length"],
    }


def test_errors_of_all_processes_are_objects_without_what_was_said(server: ServerProcess) -> None:
    assert server.http.post("/v1/completions", json={"prompt": SECRET, "max_tokens": 1}).is_success
    body = {"prompt": [11] * 30, "max_tokens": 1}
    failed = server.http.post("/v1/completions", json=body, headers={"X-Request-Id": "r-2"})
    assert (failed.status_code, failed.json()["error"]["type"]) == (500, "plugin_error")
    assert server.http.get("/v1/models", headers={"Authorization": SECRET}).status_code == 401
    assert server.http.get(f"/{SECRET}").status_code == 404
    wait_until(lambda: '"rank"' in server.output, "the rank's line")
    lines = log_of(server.output)
    (error,) = (line for line in lines if line.get("request_id") == "r-2" and "route" not in line)
    assert (error["level"], error["logger"]) == ("error", "mm_engine.server.errors")
    by_process = {line["process"]: line for line in lines}
    assert set(by_process) == {"server", "engine", "rank"}
    assert by_process["engine"]["pid"] == server.children[0]
    rank = by_process["rank"]
    assert (rank["rank"], rank["level"], rank["logger"]) == (1, "warning", "mm_engine.worker.rank")
    assert rank["pid"] not in (server.process.pid, *server.children)
    for secret in (SECRET, KEY, "Traceback", "base64"):
        assert secret not in str(lines)


def test_a_refusal_to_start_is_an_object_with_the_reason(tmp_path: Path) -> None:
    flags = ("serve", "/no/such/model", "--port", "0", "--log-format", "json")
    done = forking.run([ENGINE, *flags], timeout=60, env=environment(tmp_path))
    assert done.returncode == 1
    line = log_of(done.stderr)[-1]
    assert (line["level"], line["logger"]) == ("error", "mm_engine.cli")
    assert "/no/such/model" in line["message"]


@pytest.mark.parametrize(
    ("variable", "flags", "is_json"),
    [
        ("", (), True),  # auto, and no terminal
        ("text", (), False),
        ("text", ("--log-format", "json"), True),
        ("json", ("--log-format", "auto"), True),
        ("json", ("--log-format", "text"), False),
    ],
)
def test_the_flag_goes_before_the_variable(
    tmp_path: Path, variable: str, flags: tuple[str, ...], is_json: bool
) -> None:
    env = environment(tmp_path, MM_ENGINE_LOG_FORMAT=variable)
    command = [ENGINE, "serve", "/no/such/model", "--port", "0", *flags]
    done = forking.run(command, timeout=60, env=env)
    last = done.stderr.splitlines()[-1]
    assert last.startswith('{"time": ' if is_json else "error: ")


def test_on_a_terminal_it_is_text(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    code = "from mm_engine.server.log import configure_logging as c; c('info'); import logging\n"
    code += "logging.getLogger('mm_engine.x').info('said %d', 7)"
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True, timeout=60)
    os.close(theirs)
    shown = re.sub(r"\x1b\[[0-9;]*m", "", os.read(ours, 10_000).decode())
    os.close(ours)
    assert "INFO" in shown and "said 7" in shown and '"message"' not in shown


#: What isn't ours says something, in the engine process.
OTHERS = """
import logging, sys, warnings
from mm_engine import log
log.configure_child(logging.INFO, sys.argv[1], "engine")
import transformers
log.adopt_libraries()
transformers.utils.logging.get_logger("transformers.x").warning("a library's")
warnings.warn("a module's")
logging.getLogger("asyncio").error("a loop's")
try:
    raise ValueError("s3cr3t")
except ValueError as error:
    logging.getLogger("mm_engine.x").exception("ours")
    logging.getLogger("mm_engine.x").debug("not asked for", exc_info=error)
logging.getLogger("mm_engine.x").info("two\\nlines \\ud800", extra={"fields": {"at": 1.5}})
"""


def run_others(style: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", OTHERS, style], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_what_libraries_say_is_in_objects_too() -> None:
    lines = log_of(run_others("json"))
    said = [(line["logger"], line["message"].strip().splitlines()[0]) for line in lines]
    assert ("transformers.x", "a library's") in said
    assert ("asyncio", "a loop's") in said
    assert any(name == "py.warnings" and "a module's" in text for name, text in said)
    (ours,) = (line for line in lines if line["message"].startswith("ours"))
    assert ours["message"] == "ours: ValueError at <string>:11 in <module>"
    assert (lines[-1]["message"], lines[-1]["at"]) == ("two\nlines \ud800", 1.5)
    assert SECRET not in str(lines)


def test_the_same_in_text_has_no_objects() -> None:
    text = run_others("text")
    assert "INFO engine [" in text and "ours: ValueError at " in text
    assert SECRET not in text and '"message"' not in text
