"""`engine chat --url`: keys, names, servers that die; and what can't begin."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from odd_models import ENDLESS, plugin_flags
from serving import ENGINE, FLAGS, KEY, ServerProcess, environment, wait_until

Scripted = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that wants a key."""
    folder = tmp_path_factory.mktemp("locked")
    with ServerProcess(folder, *FLAGS, env={"MM_ENGINE_API_KEY": KEY}) as started:
        yield started


@pytest.mark.parametrize("key", [None, "wrong"])
@pytest.mark.parametrize("named", [(), ("--model", "demo")], ids=["found", "named"])
def test_without_the_key_it_says_what_to_set(
    key: str | None, named: tuple[str, ...], scripted: Scripted, locked: ServerProcess
) -> None:
    done = scripted(["What?"], "--url", locked.url, *named, key=key)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the server wants another key: ")
    assert line.endswith("Set MM_ENGINE_API_KEY, or give --api-key.")


def test_with_the_key_it_answers(scripted: Scripted, locked: ServerProcess) -> None:
    for flags, key in (((), KEY), (("--api-key", KEY), None)):
        done = scripted(["What?"], "--url", locked.url, "--max-tokens", "4", *flags, key=key)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 1


def test_a_name_that_the_server_does_not_have_is_an_error(
    scripted: Scripted, chat_server: ServerProcess
) -> None:
    for named in (("--model", "other"), ("other",)):
        done = scripted(["What?"], "--url", chat_server.url, *named)
        assert done.returncode == 1
        assert "answers 404: the model is not served here" in done.stderr


@pytest.mark.parametrize(
    ("flags", "fact"),
    [
        (("--url", "http://127.0.0.1:9"), "no server answers: http://127.0.0.1:9 (ConnectError"),
        (("--url", "127.0.0.1:9"), "no server answers: http://127.0.0.1:9 (ConnectError"),
        (("--url", "http://me:secret@127.0.0.1:9"), "no server answers: http://127.0.0.1:9 ("),
        (("--url", "http://127.0.0.1:port"), "--url is no address"),
        (("--url", "ftp://127.0.0.1:9"), "no server answers: ftp://127.0.0.1:9 (UnsupportedP"),
        (("--url", "127.0.0.1:9", "--dtype", "float32"), "--dtype is for a model that is loaded"),
        (("--url", "127.0.0.1:9", "--api-key", "a\nb"), "the API key can't be sent"),
        (("--api-key", "secret"), "--api-key is for a server: --url. Leave it out."),
        (("demo", "--model", "demo"), "two models are named: MODEL and --model"),
        (("/no/such",), "/no/such"),
        (("--top-p", "0"), "top_p must be greater than 0"),
    ],
)
def test_what_can_not_begin_is_one_line(
    flags: tuple[str, ...], fact: str, scripted: Scripted
) -> None:
    done = scripted(["What?"], *flags)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and fact in line
    assert "secret" not in line


def test_a_server_is_talked_to_without_torch(chat_server: ServerProcess, picture: Path) -> None:
    code = (
        "import sys; sys.argv = ['engine', *sys.argv[1:]]\n"
        "from mm_engine.cli.main import main\n"
        "try: main()\n"
        "finally: print('heavy:', {'torch', 'transformers', 'fastapi', 'openai'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "chat", "--url", chat_server.url, "--max-tokens", "4"],
        input=f"/image {picture}\nWhat?\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    answer, heavy = done.stdout.splitlines()
    assert answer
    assert heavy == "heavy: set()"


@pytest.mark.parametrize("dies", ["server", "engine"])
def test_a_server_that_dies_in_the_middle_of_an_answer_is_one_line(
    dies: str, tmp_path: Path
) -> None:
    folder, temporary = tmp_path / "server", tmp_path / "tmp"
    folder.mkdir()
    temporary.mkdir()
    said, told = tmp_path / "stdout", tmp_path / "stderr"
    with (
        ServerProcess(folder, *plugin_flags(tmp_path, ENDLESS)) as server,
        said.open("wb") as out,
        told.open("wb") as err,
        subprocess.Popen(
            [ENGINE, "chat", "--url", server.url],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            env=environment(temporary),
        ) as chat,
    ):
        try:
            assert chat.stdin is not None
            chat.stdin.write(b"What?\n")
            chat.stdin.close()
            wait_until(lambda: said.stat().st_size > 5, "the answer to begin")
            if dies == "engine":
                for pid in server.children:
                    os.kill(pid, signal.SIGKILL)
            else:
                server.kill()
            assert chat.wait(30) == 1
        finally:
            chat.kill()
    assert said.read_bytes().endswith(b"\n")
    (line,) = told.read_text().splitlines()
    fact = "the engine has stopped" if dies == "engine" else "the server is gone: "
    assert line.startswith("error: ") and fact in line
