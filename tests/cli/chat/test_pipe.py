"""`engine chat` in a pipe: lines in, answers out, and what is remembered from one to the next."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mm_engine import LLM, SamplingParams
from mm_engine.plugins.discovery import demos
from odd_models import ESCAPING, plugin_flags
from pictures import quarters
from serving import ServerProcess

pytestmark = pytest.mark.long

Scripted = Callable[..., subprocess.CompletedProcess[str]]
LOCAL = ("--dtype", "float32", "--kv-cache-memory", "64MiB")
QUESTIONS = ("Describe the image.", "How many objects are there?")


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """What the library answers to the questions about a picture, the second after the first."""
    llm = LLM(min(demos()), dtype="float32", kv_cache_memory=2**26, progress=False)
    parts: list[dict[str, Any]] = [{"type": "image", "image": quarters(96, 96)}]
    messages: list[dict[str, Any]] = []
    answers = []
    for question in QUESTIONS:
        content = [*parts, {"type": "text", "text": question}] if parts else question
        parts = []
        messages.append({"role": "user", "content": content})
        (output,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=16))
        answers.append(output.outputs[0].text.lstrip())
        messages.append({"role": "assistant", "content": answers[-1]})
    assert all(answers)
    return answers


def test_answers_are_the_librarys(scripted: Scripted, expected: list[str], picture: Path) -> None:
    done = scripted([f"/image {picture}", *QUESTIONS], "--max-tokens", "16", *LOCAL)
    assert done.stdout.splitlines() == expected
    assert done.returncode == 0


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_a_server_gives_the_same_answers(
    end: str, scripted: Scripted, expected: list[str], picture: Path, chat_server: ServerProcess
) -> None:
    flags = ("--url", f"{chat_server.url}{end}", "--max-tokens", "16")
    done = scripted([f"/image {picture}", *QUESTIONS], *flags)
    assert done.stdout.splitlines() == expected
    assert done.stderr == ""
    assert done.returncode == 0


@pytest.fixture
def counted(scripted: Scripted, chat_server: ServerProcess) -> Callable[..., int]:
    """Prompt tokens that the server was sent with these lines."""
    name = "mm_engine_prompt_tokens_total"

    def count(*lines: str, code: int = 0, flags: tuple[str, ...] = ()) -> int:
        before = chat_server.metric(name)
        short = ("--url", chat_server.url, "--max-tokens", "8")
        done = scripted(list(lines), *short, *flags)
        assert done.returncode == code, done.stderr
        return int(chat_server.metric(name) - before)

    return count


def test_what_was_said_before_is_sent_again(counted: Callable[..., int]) -> None:
    once = counted("What?")
    assert counted("What?", "/clear", "What?") == 2 * once  # the control
    twice = counted("What?", "What?")
    assert twice > 3 * once  # both questions and the answer between them


def test_the_last_turn_can_be_forgotten_or_asked_again(counted: Callable[..., int]) -> None:
    once = counted("What?")
    assert counted("What?", "/undo", "What?") == 2 * once
    assert counted("What?", "/retry") == 2 * once
    second = counted("What?", "Why?") - once
    assert counted("What?", "Why?", "/retry") == once + 2 * second
    assert counted("What?", "Why?", "/undo", "Why?") == once + 2 * second


def test_a_system_message_comes_first_and_can_be_taken_away(counted: Callable[..., int]) -> None:
    once = counted("What?")
    told = counted("/system Be brief.", "What?")
    assert told > once
    assert counted("What?", flags=("--system", "Be brief.")) == told
    assert counted("/system Be brief.", "/system", "What?") == once
    assert counted("/system Be brief.", "What?", "/clear", "What?") == 2 * told


def test_a_text_of_several_lines_is_one_question(counted: Callable[..., int]) -> None:
    joined = counted("What\\", "is it?")
    assert counted('"""What', 'is it?"""') == joined
    assert counted('"""', "What", "is it?", '"""') == joined
    assert counted("What", "is it?") > joined  # two of them


def test_a_turn_that_fails_is_one_line_and_not_remembered(
    counted: Callable[..., int], scripted: Scripted, chat_server: ServerProcess
) -> None:
    long = "circle " * 5000
    alone = counted("What?", "What?")
    assert counted("What?", long, "What?", code=1) == alone
    done = scripted(["What?", long, "What?"], "--url", chat_server.url, "--max-tokens", "8")
    assert len(done.stdout.splitlines()) == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the server answers 400: the prompt is too long: ")
    assert line.endswith("/undo and /clear forget what was said before.")


def test_a_turn_that_fails_here_reads_the_same(scripted: Scripted) -> None:
    flags = ("--max-tokens", "8", "--max-model-len", "256", *LOCAL)
    done = scripted(["circle " * 500, "What?"], *flags)
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the prompt is too long: ")


def test_pictures_are_looked_at_when_they_are_named(
    scripted: Scripted, chat_server: ServerProcess, picture: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    large = tmp_path / "large.png"
    large.write_bytes(bytes(11 * 2**20))
    lines = ["/image /no/such.png", f"/image {text}", f"/image {large}", f"/image {tmp_path}"]
    done = scripted([*lines, "/image", "/imagine", "What?"], "--url", chat_server.url)
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 1  # of the question
    facts = (
        "the picture can't be read: /no/such.png (No such file or directory)",
        "the data is not a PNG, JPEG, WebP or GIF picture",
        "the image is over 10485760 bytes",
        "(Is a directory)",
        "/image lacks a path",
        "no such command: /imagine",
    )
    for line, fact in zip(done.stderr.splitlines(), facts, strict=True):
        assert line.startswith("error: ") and fact in line


def test_several_pictures_go_with_the_next_question_only(
    counted: Callable[..., int], picture: Path
) -> None:
    none, one = counted("What?"), counted(f"/image {picture}", "What?")
    assert one > none + 100
    two = none + 2 * (one - none)
    assert counted(f"/image {picture}", f"/image {picture}", "What?") == two
    quoted = str(picture).replace("'", "\\'").replace(" ", "\\ ")
    assert counted(f'/image {quoted} "{picture}"', "What?") == two
    assert counted(f"/image {picture}", "/clear", "What?") == none
    again = counted(f"/image {picture}", "What?", "/clear", "What?")
    assert again == one + none


def test_more_pictures_than_the_server_takes_fail_one_turn(
    scripted: Scripted, chat_server: ServerProcess, picture: Path
) -> None:
    lines = [*[f"/image {picture}"] * 9, "What?", "What?"]
    done = scripted(lines, "--url", chat_server.url, "--max-tokens", "8")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "too many images: 9" in line
    assert len(done.stdout.splitlines()) == 1


def test_control_characters_of_a_model_reach_no_terminal(
    scripted: Scripted, tmp_path: Path
) -> None:
    done = scripted(["What?"], "--max-tokens", "3", *plugin_flags(tmp_path, ESCAPING))
    assert done.stdout == "\\x1b" * 3 + "\n"


def test_an_input_that_ends_inside_of_a_message_is_an_error(
    scripted: Scripted, chat_server: ServerProcess
) -> None:
    for lines in (['"""What?'], ["What?\\"]):
        done = scripted(lines, "--url", chat_server.url)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: the input ends inside of a message")


def test_bytes_that_are_no_text_end_nothing(scripted: Scripted, chat_server: ServerProcess) -> None:
    done = scripted(["caf\udce9?", "/exit", "What?"], "--url", chat_server.url)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1  # nothing was read after /exit
