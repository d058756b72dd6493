"""Hosts that redirect, never end, or lie. Each is cut off, with a sentence that repeats nothing."""

from __future__ import annotations

import asyncio
import gzip
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fetching import Names, fetch
from mm_engine.errors import RequestError
from mm_engine.inputs.fetch import FetchLimits
from mm_engine.inputs.host_names import resolve
from mm_engine.inputs.media import MediaLimits
from origins import (
    PICTURE,
    Answer,
    Origin,
    certificate,
    drip,
    redirect,
    send,
    several_addresses,
    status,
)

SHORT = FetchLimits(timeout=1.0)
OK = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin() as started:
        yield started


@pytest.fixture
def target() -> Iterator[Origin]:
    """Where a redirect must not lead."""
    with Origin() as started:
        yield started


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_within_what_is_allowed_are_followed(origin: Origin, code: int) -> None:
    """Rows 7 and 8, the positive control: to the same host, to another, and five in a row."""
    base = f"http://other.test:{origin.port}"
    hops = ["/1", f"{base}/2", "3", "/4", f"//pictures.test:{origin.port}/picture.png"]
    for number, location in enumerate(hops):
        origin.answers[f"/{number}"] = redirect(location, code)
    names = Names(["127.0.0.1"])
    (source,) = fetch(origin, f"http://pictures.test:{origin.port}/0", resolve=names)
    assert source.fetched == PICTURE
    assert len(origin.requests) == len(names.asked) == 6  # each is resolved and checked anew
    assert names.asked == ["pictures.test"] * 2 + ["other.test"] * 3 + ["pictures.test"]


@pytest.mark.parametrize(
    "location",
    [
        "http://elsewhere.test:{other}/picture.png",  # another host
        "http://pictures.test:{other}/picture.png",  # another port
        "http://127.0.0.1:{other}/picture.png",
        "http://[::ffff:127.0.0.1]:{other}/picture.png",
        "http://2130706433:{other}/picture.png",
        "http://user:secret@pictures.test:{own}/picture.png",
        "http://pictures.test:{own}@127.0.0.1:{other}/picture.png",
        "https://pictures.test/picture.png",  # another port by another scheme
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "gopher://127.0.0.1:{other}/",
        "http://[",
        "//elsewhere.test:{other}/picture.png",
    ],
)
def test_a_redirect_to_what_is_not_allowed_is_not_followed(
    origin: Origin, target: Origin, location: str
) -> None:
    """Row 8: to another host, port or scheme; the target counts zero hits."""
    location = location.format(own=origin.port, other=target.port)
    origin.answers["/"] = redirect(location)
    with pytest.raises(RequestError, match="redirects too often, or to where") as raised:
        fetch(origin, f"http://pictures.test:{origin.port}/")
    assert "secret" not in str(raised.value)
    assert (origin.num_hits, target.num_hits) == (1, 0)


@several_addresses
def test_a_redirect_to_a_name_of_this_machine_is_not_followed(origin: Origin) -> None:
    """Rows 7 and 8: the second host is allowed, and its address is not public."""
    origin.answers["/"] = redirect(f"http://other.test:{origin.port}/picture.png")
    with Origin(address="127.0.0.2", port=origin.port) as target:
        url = f"http://pictures.test:{origin.port}/"
        names = Names(["127.0.0.1"], ["127.0.0.2"])
        with pytest.raises(RequestError, match="an address that isn't public"):
            fetch(origin, url, resolve=names, may_dial=lambda address: address == "127.0.0.1")
        assert target.num_hits == 0
        fetch(origin, url, resolve=Names(["127.0.0.1"], ["127.0.0.2"]))
        assert target.num_hits == 1


def test_https_is_not_left_for_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 8: not even to the same host, though http is allowed there."""
    authority, tls = certificate(tmp_path, "pictures.test")
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    with Origin(tls=tls) as safe, Origin() as plain:
        allowed = f"pictures.test:{safe.port},pictures.test:{plain.port}"
        picture = f"http://pictures.test:{plain.port}/picture.png"
        safe.answers["/"] = redirect(picture)
        with pytest.raises(RequestError, match="redirects too often, or to where"):
            fetch(safe, f"https://pictures.test:{safe.port}/", allowed=allowed)
        assert (len(safe.requests), plain.num_hits) == (1, 0)
        fetch(safe, picture, allowed=allowed)
        assert plain.num_hits == 1


@pytest.mark.parametrize("loop", [1, 2, 100])
def test_loops_and_long_chains_of_redirects_end(origin: Origin, loop: int) -> None:
    """Row 8: five redirects are followed, as the first test shows, and no sixth."""
    for number in range(loop):
        origin.answers[f"/{number}"] = redirect(f"/{(number + 1) % loop}")
    with pytest.raises(RequestError, match="redirects too often, or to where"):
        fetch(origin, f"http://pictures.test:{origin.port}/0")
    assert origin.num_hits == 6


def test_a_redirect_without_a_place_is_no_picture(origin: Origin) -> None:
    origin.answers["/"] = status(302)
    with pytest.raises(RequestError, match="a status other than 200"):
        fetch(origin, f"http://pictures.test:{origin.port}/")


CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
CHUNK = b"10000\r\n" + b"x" * 65536 + b"\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        drip(OK + b"\r\n", 0, b"x" * 65536),
        drip(CHUNKED, 0, CHUNK),
        drip(OK + b"Content-Length: 99999999999\r\n\r\n", 0, b"x" * 65536),
    ],
    ids=["until the end", "chunked", "announced"],
)
def test_a_body_without_end_is_cut_off_by_bytes(origin: Origin, answer: Answer) -> None:
    """Row 9."""
    origin.answers["/"] = answer
    url = f"http://pictures.test:{origin.port}"
    limits = MediaLimits(max_bytes=10**6)
    with pytest.raises(RequestError, match="over 1000000 bytes"):
        fetch(origin, f"{url}/", media=limits)
    fetch(origin, f"{url}/picture.png", media=limits)


def test_a_body_of_exactly_the_limit_is_taken(origin: Origin) -> None:
    origin.answers["/"] = send(b"x" * 1000)
    origin.answers["/more"] = drip(OK + b"\r\n" + b"x" * 1000, 0, b"x")
    url = f"http://pictures.test:{origin.port}"
    (source,) = fetch(origin, f"{url}/", media=MediaLimits(max_bytes=1000))
    assert source.fetched == b"x" * 1000
    for path in ("/", "/more"):
        with pytest.raises(RequestError, match="over 999 bytes"):
            fetch(origin, url + path, media=MediaLimits(max_bytes=999))


@pytest.mark.parametrize(
    "answer",
    [
        drip(OK + b"\r\n", 0.05),
        drip(OK + b"Content-Length: 1000\r\n\r\n", 0.05),
        drip(OK + b"X-Long: ", 0.05),
        drip(OK, 0.05, b"A: b\r\n"),
        drip(b"", 0.05, b"HTTP/1.1 100 Continue\r\n\r\n"),
        drip(b"", 0.05, b""),
        drip(b"HTTP/1.1 200", 0.05, b""),
        drip(CHUNKED, 0.05, b"1;"),
    ],
    ids=["body", "announced", "header", "headers", "100s", "silence", "status", "chunk"],
)
def test_a_byte_now_and_then_is_cut_off_by_time(origin: Origin, answer: Answer) -> None:
    """Row 9: a byte always comes before a wait for it could end; in all it takes too long."""
    origin.answers["/"] = answer
    began = time.perf_counter()
    with pytest.raises(RequestError, match="took too long to arrive"):
        fetch(origin, f"http://pictures.test:{origin.port}/", limits=SHORT)
    assert 0.9 < time.perf_counter() - began < 30
    fetch(origin, f"http://pictures.test:{origin.port}/picture.png", limits=SHORT)


def test_redirects_do_not_begin_the_time_anew(origin: Origin) -> None:
    """Row 9."""
    for number in range(5):
        start = f"HTTP/1.1 302 Found\r\nLocation: /{number + 1}\r\nX-Long: ".encode()
        origin.answers[f"/{number}"] = drip(start, 0.4, b"\r\n\r\n")
    began = time.perf_counter()
    with pytest.raises(RequestError, match="took too long to arrive"):
        fetch(origin, f"http://pictures.test:{origin.port}/0", limits=SHORT)
    assert time.perf_counter() - began < 30
    assert 2 <= origin.num_hits <= 4


def test_time_for_the_name_is_counted(origin: Origin) -> None:
    async def never(host: str, port: int) -> list[str]:
        await asyncio.sleep(60)
        return []

    for limits in (SHORT, FetchLimits(connect_timeout=0.5)):
        began = time.perf_counter()
        with pytest.raises(RequestError, match="took too long to arrive"):
            fetch(origin, f"http://pictures.test:{origin.port}/", resolve=never, limits=limits)
        assert time.perf_counter() - began < 30


SILENT_NAME_SERVER = """
import asyncio, socket, time
from mm_engine.inputs.host_names import resolve

looking_up = []
socket.getaddrinfo = lambda *args, **options: looking_up.append(args) or time.sleep(60)

async def main():
    many = [asyncio.wait_for(resolve("a.test", 80), 0.5) for _ in range(40)]
    print(set(map(type, await asyncio.gather(*many, return_exceptions=True))), len(looking_up))

asyncio.run(main())
"""


def test_a_silent_name_server_holds_up_neither_others_nor_the_end() -> None:
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", SILENT_NAME_SERVER], capture_output=True, text=True, check=True
    )
    assert done.stdout == "{<class 'TimeoutError'>} 40\n"
    assert done.stderr == ""
    assert time.perf_counter() - began < 30


def test_the_system_resolves_names_and_says_which_it_does_not_know() -> None:
    assert asyncio.run(resolve("127.0.0.1", 80)) == ["127.0.0.1"]
    with pytest.raises(UnicodeError):
        asyncio.run(resolve("a..b", 80))


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "identity, gzip", "x"])
def test_a_compressed_body_is_refused_unread(origin: Origin, encoding: str) -> None:
    """Row 9: a gzip bomb; the same bytes without the header are counted as they are."""
    bomb = gzip.compress(b"\0" * 30_000_000)
    origin.answers["/"] = send(bomb, Content_Encoding=encoding)
    origin.answers["/plain"] = send(bomb, Content_Encoding="Identity")
    with pytest.raises(RequestError, match="sent it compressed"):
        fetch(origin, f"http://pictures.test:{origin.port}/")
    (source,) = fetch(origin, f"http://pictures.test:{origin.port}/plain")
    assert source.fetched == bomb


@pytest.mark.parametrize(
    ("answer", "fact"),
    [
        (status(404), "a status other than 200"),
        (status(500), "a status other than 200"),
        (status(206), "a status other than 200"),
        (drip(b"nonsense\r\n\r\n", 0.05), "broke off"),
        (drip(b"SSH-2.0-secret\r\n\r\n", 0.05), "broke off"),
        (drip(OK + b"A: b\r\n" * 100_000, 0.05), "broke off"),
        (drip(OK + b"Content-Length: 999999999999999999999\r\n\r\n", 0.05), "broke off"),
        (drip(OK + b"Content-Length: -1\r\n\r\n", 0.05), "broke off"),
        (drip(OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n", 0.05), "broke off"),
        (drip(OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 0.05), "broke off"),
        (drip(CHUNKED + b"zz\r\n", 0.05), "broke off"),
        (send(b"short", Content_Length="100"), "broke off"),
        (lambda handler: None, "broke off"),
    ],
)
def test_what_is_no_whole_answer_is_refused(origin: Origin, answer: Answer, fact: str) -> None:
    origin.answers["/secret?secret"] = answer
    url = f"http://pictures.test:{origin.port}/secret?secret#secret"
    with pytest.raises(RequestError, match=fact) as raised:
        fetch(origin, url)
    assert raised.value.status == 400
    assert raised.value.param == "0"
    assert "secret" not in str(raised.value)


def test_hosts_that_cannot_be_reached_are_told_alike(origin: Origin) -> None:
    """Whether a port is closed isn't told of addresses that aren't public: none is dialled."""
    with Origin() as closed:
        pass
    said = set()
    for port in (closed.port, origin.port):
        with pytest.raises(RequestError) as raised:
            fetch(origin, f"http://a.test:{port}/", allowed=f"a.test:{port}", may_dial=None)
        said.add(str(raised.value))
    assert len(said) == 1 and "an address that isn't public" in said.pop()
    with pytest.raises(RequestError, match="can't be reached"):
        fetch(origin, f"http://a.test:{closed.port}/", allowed=f"a.test:{closed.port}")


@pytest.mark.parametrize("error", [OSError("secret"), UnicodeError("secret")])
def test_a_name_without_address_is_refused(origin: Origin, error: Exception) -> None:
    async def fail(host: str, port: int) -> list[str]:
        raise error

    async def none(host: str, port: int) -> list[str]:
        return []

    for names in (fail, none):
        with pytest.raises(RequestError, match="the image's host has no address") as raised:
            fetch(origin, f"http://pictures.test:{origin.port}/", resolve=names)
        assert "secret" not in str(raised.value)
