"""Connections that take their time, or are too many, or speak no HTTP. Row 14."""

from __future__ import annotations

import json
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bystanders import undisturbed
from mm_engine.cli.main import app
from mm_engine.server import log, run
from mm_engine.server.connection import OTHER_FILES, room_for
from mm_engine.server.settings import ServerSettings
from serving import KEY, ServerProcess, wait_until

HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\n"
MAX_CONNECTIONS = 12


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that waits a second for a head, and takes a dozen connections."""
    settings = {"head_timeout": 1.0, "max_connections": MAX_CONNECTIONS}
    with ServerProcess(tmp_path_factory.mktemp("impatient"), settings=settings) as started:
        yield started


def connect(server: ServerProcess) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def rest(connection: socket.socket) -> bytes:
    """All that comes until the server closes."""
    try:
        return b"".join(iter(lambda: connection.recv(2**16), b""))
    except ConnectionResetError:
        return b""


def refused(connection: socket.socket) -> bytes:
    """One whole error, behind which the connection may stay open."""
    answer = connection.recv(2**16)
    while answer and not answer.endswith(b"}}"):
        answer += connection.recv(2**16)
    return answer


def status_of(answer: bytes) -> int:
    """The status of an answer in OpenAI's shape."""
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert b"application/json" in head
    return int(head.split()[1])


def dripped(connection: socket.socket, piece: bytes, seconds: float, limit: float = 15) -> bytes:
    """What is answered, and when: to one who sends a piece now and then and never ends."""
    connection.settimeout(seconds)
    start = time.monotonic()
    while time.monotonic() - start < limit:
        try:
            connection.sendall(piece)
            answer = connection.recv(2**16)
        except TimeoutError:
            continue
        except (BrokenPipeError, ConnectionResetError):
            return b""
        return answer if not answer or answer.endswith(b"}}") else answer + refused(connection)
    raise AssertionError(f"still taken after {limit} s")


def test_a_head_that_never_ends_is_408_within_its_time(impatient: ServerProcess) -> None:
    with undisturbed(impatient), connect(impatient) as connection:
        start = time.monotonic()
        connection.sendall(HEAD)
        answer = dripped(connection, b"x", 0.1)
        assert 0.8 < time.monotonic() - start < 60
        assert status_of(answer) == 408
        assert b"connection: close" in answer.lower()


def test_a_head_in_pieces_that_ends_in_time_is_answered(impatient: ServerProcess) -> None:
    """The positive control; and the time for an answer isn't a head's."""
    with connect(impatient) as connection:
        for start in range(0, len(HEAD), 16):
            connection.sendall(HEAD[start : start + 16])
            time.sleep(0.1)
        connection.sendall(b"\r\n")
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200 ")
    body = {"prompt": "circle", "ignore_eos": True, "max_tokens": 3000, "n": 8, "timeout": 3}
    assert impatient.http.post("/v1/completions", json=body).status_code in (200, 504)


def test_the_head_of_a_later_request_has_no_more_time(impatient: ServerProcess) -> None:
    with connect(impatient) as connection:
        connection.sendall(HEAD + b"\r\n")
        answer = b""
        while not answer.endswith(b'"ok"}'):
            answer += connection.recv(2**16)
        connection.sendall(HEAD)
        assert status_of(dripped(connection, b"x", 0.1)) == 408


def test_what_is_left_of_a_body_after_its_answer_has_no_more_time(impatient: ServerProcess) -> None:
    with connect(impatient) as connection:
        connection.sendall(b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert status_of(refused(connection)) == 404
        assert dripped(connection, b"x", 0.1) == b""


def test_a_connection_that_says_nothing_is_closed(impatient: ServerProcess) -> None:
    with connect(impatient) as connection:
        start = time.monotonic()
        assert rest(connection) == b""
        assert 0.8 < time.monotonic() - start < 60


def test_idle_connections_give_way_to_new_ones(tmp_path: Path) -> None:
    settings = {"head_timeout": 60.0, "max_connections": MAX_CONNECTIONS}
    with ServerProcess(tmp_path, settings=settings) as server:
        idle = [connect(server) for _ in range(MAX_CONNECTIONS)]
        for connection in idle:
            connection.sendall(HEAD)  # never ended
        try:
            assert server.http.get("/health").status_code == 200  # it's the 13th
            assert rest(idle[0]) == b"", "the longest idle has made room"
            idle[-1].sendall(b"\r\n")
            assert idle[-1].recv(2**16).startswith(b"HTTP/1.1 200 "), "the others are still there"
        finally:
            for connection in idle:
                connection.close()
        with undisturbed(server):
            pass


def test_where_all_have_a_request_one_more_is_503(impatient: ServerProcess) -> None:
    body = b'{"prompt": "circle", "ignore_eos": true, "max_tokens": 3000, "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
    impatient.http.close()  # its idle connection
    busy = []
    try:
        for _ in range(MAX_CONNECTIONS):
            busy.append(connect(impatient))
            busy[-1].sendall(head + body)
            assert busy[-1].recv(2**10).startswith(b"HTTP/1.1 200 ")
        with connect(impatient) as connection:
            answer = rest(connection)
        assert status_of(answer) == 503
        assert b"retry-after: 1" in answer.lower()
    finally:
        for connection in busy:
            connection.close()
        impatient.http = type(impatient.http)(base_url=impatient.url, timeout=60)
    wait_until(lambda: impatient.is_idle, "everything given back")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 100_000, 431),
        (b"GET /health HTTP/1.1\r\n" + b"X-Many: 1\r\n" * 20_000 + b"\r\n", 431),
        (b"\x16\x03\x01\x02\x00s3cr3t\r\n\r\n", 400),
        (b"GET /health\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /health HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n", 400),
        (b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: s3cr3t\r\n\r\n", 400),
        (b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: s3cr3t\r\n\r\n", 501),
    ],
)
def test_what_is_no_http_is_refused_in_our_shape(
    server: ServerProcess, sent: bytes, status: int
) -> None:
    with undisturbed(server), connect(server) as connection:
        connection.sendall(sent)
        answer = rest(connection)
        assert status_of(answer) == status
        assert b"s3cr3t" not in answer


@pytest.mark.parametrize("path", ["/tokenize", "/nothing"])
def test_a_bad_chunk_ends_its_request_alone(server: ServerProcess, path: str) -> None:
    """Before the answer, and after it."""
    with undisturbed(server), connect(server) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        if path == "/nothing":
            assert status_of(refused(connection)) == 404
        connection.sendall(b"s3cr3t\r\n{}\r\n")
        answer = rest(connection)
        assert answer == b"" or status_of(answer) == 400
    assert "internal error" not in server.output


def test_defaults_are_bounded_and_the_key_comes_after(strict: ServerProcess) -> None:
    settings = ServerSettings(served_model_names=("x",))
    assert (settings.head_timeout, settings.max_connections) == (10.0, 1024)
    with connect(strict) as connection:  # no key is asked for before there is a head
        connection.sendall(HEAD.replace(b"/health", b"/version") + b"\r\n")
        assert connection.recv(2**16).startswith(b"HTTP/1.1 401 ")
    assert KEY not in strict.output


def test_descriptors_are_taken_for_as_many_connections_as_may_be() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (OTHER_FILES + 10, before[1]))
        assert room_for(20) == 20
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == OTHER_FILES + 20
        assert room_for(5) == 5
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_flag_sets_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ServerSettings] = []

    def run_server(config: object, settings: ServerSettings, ready: object) -> int:
        asked.append(settings)
        return 0

    monkeypatch.setattr(run, "serve", run_server)
    monkeypatch.setattr(log, "configure_logging", lambda *told: None)
    for flags in ((), ("--max-connections", "7")):
        assert CliRunner().invoke(app, ["serve", *flags]).exit_code == 0
    assert [settings.max_connections for settings in asked] == [1024, 7]
