"""Several keys, what each may have, TLS and CORS. Row 16 of the robustness table."""

from __future__ import annotations

import asyncio
import hmac
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from mm_engine.cli.main import app
from mm_engine.errors import Overloaded, StartupError
from mm_engine.server.keys import ApiKey, KeyLimits, read_keys
from serving import FLAGS, ServerProcess, wait_until

COMPLETIONS = "/v1/completions"
SHORT: dict[str, Any] = {"prompt": "A red circle and what is beside it", "max_tokens": 2}
KEYS = ("key-of-alice", "key-of-bob", "key-of-carol")


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the command openssl, for a certificate")
    folder = tmp_path_factory.mktemp("certified")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


@pytest.fixture(scope="module")
def shared(
    certified: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server for several keys, over TLS, with a limit for each and a page that may ask."""
    folder = tmp_path_factory.mktemp("shared")
    file = folder / "keys"
    file.write_text(f"# who may come in\n{KEYS[0]}\n\n  {KEYS[1]}   # bob\n")
    certificate, key = certified
    flags = (
        *FLAGS,
        *("--api-key-file", str(file), "--api-key", KEYS[2]),
        *("--max-requests-per-key", "2"),
        *("--allowed-origins", "https://page.example"),
        *("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key)),
    )
    with ServerProcess(folder, *flags) as started:
        started.http = httpx.Client(
            base_url=started.url,
            timeout=60,
            verify=ssl.create_default_context(cafile=str(certificate)),
        )
        yield started


def as_(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_the_server_speaks_https(shared: ServerProcess) -> None:
    assert shared.url.startswith("https://")
    assert shared.http.get("/health").status_code == 200
    with pytest.raises(httpx.HTTPError):
        httpx.get(shared.url.replace("https", "http") + "/health", timeout=10)


def test_a_handshake_has_as_long_as_a_head(certified: tuple[Path, Path], tmp_path: Path) -> None:
    """Who connects and says nothing, or not all, would hold a file of the process for a minute."""
    certificate, key = certified
    files = {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
    with ServerProcess(tmp_path, settings={**files, "head_timeout": 2.0}) as server:
        address = server.url.removeprefix("https://").split(":")
        for begun in (b"", b"\x16\x03\x01"):
            with socket.create_connection((address[0], int(address[1])), timeout=30) as silent:
                silent.sendall(begun)
                start = time.monotonic()
                assert silent.recv(1) == b""
                assert 1 < time.monotonic() - start < 25
        verified = ssl.create_default_context(cafile=str(certificate))
        assert httpx.get(f"{server.url}/health", verify=verified).status_code == 200
        assert "Traceback" not in server.output


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens(shared: ServerProcess, key: str) -> None:
    assert shared.http.get("/v1/models", headers=as_(key)).status_code == 200
    assert shared.http.get("/v1/models", headers=as_(key + "x")).status_code == 401
    assert shared.http.get("/v1/models", headers=as_("# bob")).status_code == 401
    assert key not in shared.output


def test_no_key_finds_what_another_had_computed(shared: ServerProcess) -> None:
    def cached(key: str) -> int:
        body = {"prompt": "What is seen with which key? " * 8, "max_tokens": 1}
        answer = shared.http.post(COMPLETIONS, json=body, headers=as_(key)).json()
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached(KEYS[0]) == 0
    assert cached(KEYS[1]) == 0
    assert cached(KEYS[0]) > 0 and cached(KEYS[1]) > 0


def test_one_key_cant_take_all_places(shared: ServerProcess) -> None:
    body = {"prompt": "circle", "ignore_eos": True, "max_tokens": 4000, "stream": True}
    leave = threading.Event()

    def hold() -> None:
        with shared.http.stream("POST", COMPLETIONS, json=body, headers=as_(KEYS[0])) as answer:
            for _ in answer.iter_lines():
                if leave.is_set():
                    return

    holders = [threading.Thread(target=hold) for _ in range(2)]
    for holder in holders:
        holder.start()

    def running() -> bool:
        text = shared.http.get("/metrics", headers=as_(KEYS[1])).text
        return "mm_engine_num_requests_running 2.0" in text

    try:
        wait_until(running, "both to run")
        refused = shared.http.post(COMPLETIONS, json=SHORT, headers=as_(KEYS[0]))
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert "2 are answered for each key" in refused.json()["error"]["message"]
        assert shared.http.post(COMPLETIONS, json=SHORT, headers=as_(KEYS[1])).status_code == 200
    finally:
        leave.set()
        for holder in holders:
            holder.join()
    wait_until(
        lambda: shared.http.post(COMPLETIONS, json=SHORT, headers=as_(KEYS[0])).status_code == 200,
        "places to be free again",
    )


def preflight(server: ServerProcess, origin: str) -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang",
    }
    return server.http.options(COMPLETIONS, headers=headers)


def test_only_named_pages_may_ask(shared: ServerProcess, server: ServerProcess) -> None:
    allowed = preflight(shared, "https://page.example")
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    other = preflight(shared, "https://other.example")
    assert "access-control-allow-origin" not in other.headers
    headers = {**as_(KEYS[0]), "Origin": "https://page.example"}
    answer = shared.http.get("/v1/models", headers=headers)
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    # The other server was told of none.
    assert "access-control-allow-origin" not in preflight(server, "https://page.example").headers


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_rate_lets_a_minutes_requests_through_and_then_so_many_a_minute() -> None:
    clock = Clock()
    limits = KeyLimits(None, 30, clock)
    num_taken: dict[bytes, int] = {}

    def taken(key: bytes) -> int:
        def begin_all() -> None:
            while True:
                limits.begin(key)
                limits.end(key)
                num_taken[key] += 1

        num_taken[key] = 0
        with pytest.raises(Overloaded) as refused:
            begin_all()
        assert 1 <= refused.value.retry_after <= 2
        return num_taken[key]

    assert taken(b"a") == 30
    assert taken(b"b") == 30  # of its own
    clock.now += 10.0
    assert taken(b"a") == 5
    clock.now += 1e6
    assert taken(b"a") == 30


def test_the_rate_is_the_servers_without_keys(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, *FLAGS, "--max-requests-per-minute", "3") as server:
        answers = [server.http.post(COMPLETIONS, json=SHORT) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 20
        assert server.http.get("/v1/models").status_code == 200  # takes nothing of the engine


@pytest.mark.parametrize(
    ("given", "content", "told"),
    [
        ((), "# none\n", "no API key"),
        ((), None, "can't be read"),
        (("two words",), "a", "other characters"),
        (("",), "a", "empty"),
        (("schlüssel",), "a", "other characters"),
        ((), "ключ\n", "can't be read"),
    ],
)
def test_keys_that_cant_be_are_refused(
    tmp_path: Path, given: tuple[str, ...], content: str | None, told: str
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content, "utf-8")
    with pytest.raises(StartupError, match=told):
        read_keys(given, file)


def test_keys_are_those_of_flag_and_file_together(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("b\nc # not b\n#d\n\ns3cr#et\n")
    assert read_keys(("a", "b"), file) == ("a", "b", "c", "s3cr#et")
    assert read_keys((), None) == ()


@pytest.mark.parametrize("value", ["", "  "])
def test_a_variable_without_a_key_is_no_open_door(value: str) -> None:
    done = CliRunner().invoke(app, ["serve", "/no/such"], env={"MM_ENGINE_API_KEY": value})
    assert isinstance(done.exception, StartupError)
    assert "holds no key" in str(done.exception)


@pytest.mark.parametrize("case", ["junk", "key alone", "no key", "folder"])
def test_certificates_are_looked_at_before_the_model_is_loaded(tmp_path: Path, case: str) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    flags = {
        "junk": ["--ssl-certfile", str(junk), "--ssl-keyfile", str(junk)],
        "key alone": ["--ssl-keyfile", str(junk)],
        "no key": ["--ssl-certfile", str(junk)],
        "folder": ["--ssl-certfile", str(tmp_path)],
    }
    done = CliRunner().invoke(app, ["serve", "/no/such", *flags[case]])
    told = str(done.exception) + done.output
    assert "--ssl-" in told and "/no/such" not in told
    assert isinstance(done.exception, StartupError) or done.exit_code == 2


@pytest.mark.parametrize("sent", [*KEYS, "", "x", KEYS[0][:-1], "x" * 10_000])
def test_every_key_is_compared_whichever_is_sent(
    monkeypatch: pytest.MonkeyPatch, sent: str
) -> None:
    """So that the time it takes tells nothing: whole digests, each with all of them."""
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def counted(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return compare(a, b)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    statuses: list[int] = []

    async def send(message: Any) -> None:
        statuses.append(message.get("status", 0))

    async def app(*_: Any) -> None:
        statuses.append(200)

    headers = [(b"authorization", f"Bearer {sent}".encode())]
    scope = {"type": "http", "path": "/v1/models", "headers": headers}
    asyncio.run(ApiKey(app, KEYS)(scope, None, send))  # type: ignore[arg-type]
    assert statuses[0] == (200 if sent in KEYS else 401)
    assert compared == [(32, 32)] * len(KEYS)
