"""`engine chat` in a terminal: Ctrl-C and Ctrl-D, what is shown besides answers, Tab."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mm_engine.engine.process import SOCKET_NAME
from odd_models import ENDLESS, plugin_flags
from serving import ENGINE, ServerProcess, environment, wait_until
from terminal import CTRL_C, CTRL_D, TAB, Terminal

pytestmark = pytest.mark.long

HINT = "/exit or Ctrl-D leaves"


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files whose name is short: a socket's path has few characters."""
    with tempfile.TemporaryDirectory(prefix="mm-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose answers don't end by themselves, with one seat."""
    folder = tmp_path_factory.mktemp("endless")
    flags = plugin_flags(folder, ENDLESS)
    with ServerProcess(folder, *flags, "--max-num-seqs", "1") as started:
        yield started


def prompt_tokens(status: str) -> int:
    found = re.search(r"prompt (\d+) tokens", status)
    assert found is not None, status
    return int(found[1])


def give_up(terminal: Terminal, begun: str) -> None:
    """Begin a line, and press Ctrl-C."""
    terminal.type(begun)
    terminal.expect(re.escape(begun))
    time.sleep(0.3)  # Python sees the signal while readline waits for a key, not just before
    terminal.type(CTRL_C)
    terminal.expect(HINT)
    terminal.expect("> ")


def test_ctrl_c_stops_an_answer_and_what_was_said_stays(tmp_path: Path, temporary: Path) -> None:
    command = [ENGINE, "chat", *plugin_flags(tmp_path, ENDLESS)]
    with Terminal(command, environment(temporary)) as terminal:
        terminal.expect("(?s)on cpu.*/help lists", 120)
        terminal.expect("> ")
        (engine,) = psutil.Process(terminal.process.pid).children()
        prompts = []
        for _ in range(2):  # the engine has one seat: it is free again
            terminal.type("What?\n")
            terminal.expect(r"What\?\n.{60}")
            terminal.type(CTRL_C)
            prompts.append(prompt_tokens(terminal.expect(r"\d+ tokens · .*stopped", 20)))
            terminal.expect("> ")
        assert prompts[1] > 2 * prompts[0] + 5  # both questions and the answer between them
        engine.cpu_percent()
        wait_until(lambda: engine.cpu_percent(0.5) < 20, "the engine to be idle")
        terminal.type("/exit\n")
        assert terminal.end() == 0
        assert not engine.is_running()
    assert "Traceback" not in terminal.text
    assert list(temporary.rglob("*")) == []


def test_ctrl_c_stops_a_servers_answer(endless: ServerProcess, temporary: Path) -> None:
    command = [ENGINE, "chat", "--url", endless.url]
    with Terminal(command, environment(temporary)) as terminal:
        for _ in range(2):
            terminal.expect("> ")
            terminal.type("What?\n")
            terminal.expect(r"What\?\n.{20}")
            assert not endless.is_idle
            terminal.type(CTRL_C)
            terminal.expect(r"about \d+ tokens · .*stopped", 20)
            wait_until(lambda: endless.is_idle, "everything given back")
        terminal.expect("> ")
        terminal.type(CTRL_D)
        assert terminal.end() == 0
    assert "Traceback" not in terminal.text


def test_keys_at_the_prompt(endless: ServerProcess, temporary: Path) -> None:
    command = [ENGINE, "chat", "--url", endless.url, "--max-tokens", "5"]
    with Terminal(command, environment(temporary)) as terminal:
        terminal.expect("> ")
        give_up(terminal, "never mind")
        terminal.type('"""What\n')
        terminal.expect(r"What\n\. ")
        give_up(terminal, "is it?")
        terminal.type("/he" + TAB + "\n")
        terminal.expect("attach a picture to the next message")
        terminal.type("What?\n")
        status = terminal.expect(r"\d+ tokens · .*")
        assert re.fullmatch(
            r"5 tokens · [\d.,]+ tokens/s · TTFT [\d.]+ m?s · prompt \d+ tokens · "
            r"cut off at the most tokens",
            status.strip(),
        )
        terminal.expect("> ")
        terminal.type(CTRL_D)
        assert terminal.end() == 0


def test_tab_completes_a_pictures_path(
    endless: ServerProcess, temporary: Path, picture: Path
) -> None:
    command = [ENGINE, "chat", "--url", endless.url]
    with Terminal(command, environment(temporary)) as terminal:
        terminal.expect("> ")
        terminal.type(f"/im{TAB}{picture.parent}/it{TAB}\n")
        shown = terminal.expect(r"attached to the next message: .*")
        assert shown.strip().endswith("it's a picture.png (96 × 96, 1 KiB)")
        terminal.type("/image /no/such.png\n")
        terminal.expect(r"error: the picture can't be read: /no/such.png")
        terminal.type("/clear\n")
        terminal.expect("the conversation begins anew")


def test_an_error_of_a_turn_does_not_end_it(tmp_path: Path, temporary: Path) -> None:
    command = [ENGINE, "chat", *plugin_flags(tmp_path, ENDLESS)]
    with Terminal(command, environment(temporary)) as terminal:
        terminal.expect("> ", 120)
        terminal.type("What?\n")
        terminal.expect(r"What\?\n.{20}")
        (engine,) = psutil.Process(terminal.process.pid).children()
        engine.kill()
        terminal.expect("error: the engine has stopped: killed by SIGKILL")
        terminal.expect("> ")
        terminal.type("/exit\n")
        assert terminal.end() == 0


def test_sigterm_leaves_nothing(tmp_path: Path, temporary: Path) -> None:
    command = [ENGINE, "chat", *plugin_flags(tmp_path, ENDLESS)]
    with Terminal(command, environment(temporary)) as terminal:
        terminal.expect("> ", 120)
        (engine,) = psutil.Process(terminal.process.pid).children()
        terminal.type("What?\n")
        terminal.expect(r"What\?\n.{20}")
        os.kill(terminal.process.pid, signal.SIGTERM)
        assert terminal.end() == 128 + signal.SIGTERM
        assert not engine.is_running()
    assert list(temporary.rglob("*")) == []


def test_ctrl_c_while_the_model_loads_ends_it(tmp_path: Path, temporary: Path) -> None:
    command = [ENGINE, "chat", *plugin_flags(tmp_path, ENDLESS)]
    with Terminal(command, environment(temporary)) as terminal:
        wait_until(lambda: any(temporary.rglob(SOCKET_NAME)), "the engine to be told")
        terminal.type(CTRL_C)
        assert terminal.end() == 130
    assert list(temporary.rglob("*")) == []
