"""Pictures from other hosts, over real sockets: what is taken, and how it is asked for."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from fetching import Names, fetch, sources
from mm_engine.cli.options import check_media
from mm_engine.errors import Overloaded, RequestError, StartupError
from mm_engine.inputs.fetch import Fetcher, FetchLimits, authorities
from mm_engine.inputs.media import MediaLimits, load_images
from mm_engine.inputs.remote_urls import parse_allowed_hosts
from origins import PICTURE, Origin, certificate, drip, send, several_addresses, slow
from pictures import data_url, encode, quarters


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin() as started:
        yield started


def test_a_picture_arrives_as_it_was_sent(origin: Origin) -> None:
    ended: list[tuple[str, float]] = []
    url = f"http://pictures.test:{origin.port}/picture.png"
    (source,) = fetch(origin, url, on_end=lambda *end: ended.append(end))
    assert source.fetched == PICTURE
    assert load_images([source], MediaLimits())[0].size == (24, 16)
    ((outcome, seconds),) = ended
    assert outcome == "ok" and 0 < seconds < 15


def test_defaults_are_those_of_the_documentation() -> None:
    assert FetchLimits() == FetchLimits(
        connect_timeout=5, timeout=15, max_redirects=5, max_fetches=16
    )


def test_authorities_that_cannot_be_read_are_told_at_startup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authorities()
    for name in ("missing", "empty"):
        (tmp_path / "empty").write_text("")
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / name))
        with pytest.raises(StartupError, match="^authorities for https can't be read: .*SSL_CERT"):
            check_media(["example.com"], None)
        check_media(None, None)


def test_what_is_asked_for_says_little(origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    origin.answers["/cookie"] = send(PICTURE, Set_Cookie="a=b; Path=/")
    with Origin() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        url = f"http://Pictures.TEST.:{origin.port}"
        for path in ("/cookie", "/picture.png"):
            fetch(origin, url + path)
        assert proxy.num_hits == 0
    assert [path for path, _ in origin.requests] == ["/cookie", "/picture.png"]
    for _, headers in origin.requests:
        assert {name.lower() for name in headers} == {
            *("host", "user-agent", "accept", "accept-encoding", "connection"),
        }
        assert headers["Host"] == f"pictures.test:{origin.port}"
        assert headers["Accept-Encoding"] == "identity"


def test_images_are_fetched_at_the_same_time_and_stay_in_order(origin: Origin) -> None:
    meeting = threading.Barrier(3)  # passed by three at once, or by none

    def after_meeting(answer: Callable[[BaseHTTPRequestHandler], None]) -> Any:
        def late(handler: BaseHTTPRequestHandler) -> None:
            meeting.wait(10)
            answer(handler)

        return late

    widths = (1, 2, 3)
    for width, seconds in zip(widths, (0.2, 0.1, 0.0), strict=True):
        answer = slow(send(encode(quarters(width * 2, 2))), seconds)
        origin.answers[f"/{width}"] = after_meeting(answer)
    urls = [f"http://pictures.test:{origin.port}/{width}" for width in widths]
    urls.insert(1, data_url(encode(quarters(8, 8))))
    found = fetch(origin, *urls)
    images = load_images(found, MediaLimits())
    assert [image.width for image in images] == [2, 8, 4, 6]


@several_addresses
def test_a_name_is_resolved_once_and_that_address_is_dialled(origin: Origin) -> None:
    """Row 7: whoever answers for the name may say something else the second time."""
    names = Names(["127.0.0.2"], ["127.0.0.1"])
    with Origin(address="127.0.0.2", port=origin.port) as first:
        url = f"http://pictures.test:{origin.port}/picture.png"
        (source,) = fetch(origin, url, resolve=names, may_dial=lambda a: a == "127.0.0.2")
        assert source.fetched == PICTURE
        assert (first.num_hits, origin.num_hits, names.asked) == (1, 0, ["pictures.test"])
        with pytest.raises(RequestError, match="an address that isn't public"):
            fetch(origin, url, resolve=names, may_dial=lambda a: a == "127.0.0.2")
        assert (first.num_hits, origin.num_hits) == (1, 0)


@several_addresses
def test_an_address_that_cannot_be_reached_is_followed_by_the_next(origin: Origin) -> None:
    names = Names(["127.0.0.3", "127.0.0.4", "127.0.0.1"])
    url = f"http://pictures.test:{origin.port}/picture.png"
    (source,) = fetch(origin, url, resolve=names)
    assert source.fetched == PICTURE
    assert (origin.num_hits, names.asked) == (1, ["pictures.test"])


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["::1"], ["::ffff:127.0.0.1"], ["8.8.8.8", "127.0.0.1"], ["fe80::1%lo"]],
    ids=str,
)
def test_an_address_that_is_not_public_is_never_dialled(
    origin: Origin, addresses: list[str]
) -> None:
    """Row 7: the host is allowed, its name isn't at fault; with the rule off, it is fetched."""
    url = f"http://pictures.test:{origin.port}/picture.png"
    with pytest.raises(RequestError, match="an address that isn't public"):
        fetch(origin, url, resolve=Names(addresses), may_dial=None)
    assert origin.num_hits == 0
    fetch(origin, url)
    assert origin.num_hits == 1


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST.", "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.1"),
        *("0", "0.0.0.0", "017700000001", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"),
    ],
)
def test_the_system_finds_this_machine_in_any_spelling_and_it_is_refused(host: str) -> None:
    """Row 7: all of them are allowed, resolved by the system, and lead to the listener."""
    with Origin(address="0.0.0.0") as origin:
        url = f"http://{host}:{origin.port}/picture.png"
        options: dict[str, Any] = {"allowed": f"{host}:{origin.port}", "resolve": None}
        with pytest.raises(RequestError, match="an address that isn't public"):
            fetch(origin, url, may_dial=None, **options)
        assert origin.num_hits == 0
        if host != "[::]":  # the listener is one of IPv4
            fetch(origin, url, may_dial=lambda address: True, **options)
            assert origin.num_hits == 1


def test_https_is_checked_by_the_name_and_dialled_by_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, tls = certificate(tmp_path, "pictures.test")
    with Origin(tls=tls) as origin:
        url = f"https://pictures.test:{origin.port}/picture.png"
        with pytest.raises(RequestError, match="no valid certificate"):
            fetch(origin, url)  # signed by nobody known
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        (source,) = fetch(origin, url)
        assert source.fetched == PICTURE
        assert origin.names == ["pictures.test"] * 2
        with pytest.raises(RequestError, match="no valid certificate"):
            fetch(origin, f"https://other.test:{origin.port}/picture.png")
        assert len(origin.requests) == 1


def test_bytes_are_counted_over_all_images_of_a_request(origin: Origin) -> None:
    urls = [f"http://pictures.test:{origin.port}/picture.png"] * 2
    both = MediaLimits(max_total_bytes=2 * len(PICTURE))
    assert len(fetch(origin, *urls, media=both)) == 2
    with pytest.raises(RequestError, match="bytes together"):
        fetch(origin, *urls, media=MediaLimits(max_total_bytes=2 * len(PICTURE) - 1))


def test_what_came_with_the_request_is_counted_before_anything_is_fetched(origin: Origin) -> None:
    urls = [data_url(PICTURE), f"http://pictures.test:{origin.port}/picture.png"]
    with pytest.raises(RequestError, match="bytes together") as raised:
        fetch(origin, *urls, media=MediaLimits(max_total_bytes=len(PICTURE) // 2))
    assert raised.value.param == "0"
    assert origin.num_hits == 0


def test_a_request_with_a_url_that_is_not_taken_fetches_nothing(origin: Origin) -> None:
    good = f"http://pictures.test:{origin.port}/picture.png"
    with pytest.raises(RequestError, match="doesn't fetch from") as raised:
        fetch(origin, good, "http://elsewhere.test/secret.png")
    assert raised.value.param == "1"
    assert origin.num_hits == 0


def test_only_so_many_are_fetched_at_a_time(origin: Origin) -> None:
    lock, now, most = threading.Lock(), 0, 0

    def counted(handler: BaseHTTPRequestHandler) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        slow(send(PICTURE), 0.1)(handler)
        with lock:
            now -= 1

    origin.answers["/counted"] = counted
    urls = [f"http://pictures.test:{origin.port}/counted"] * 6
    fetch(origin, *urls, limits=FetchLimits(max_fetches=2))
    assert (len(origin.requests), most) == (6, 2)


def test_who_waits_too_long_for_a_turn_is_told_to_come_again(origin: Origin) -> None:
    origin.answers["/slow"] = drip(b"", 0.05, b"")
    url = f"http://pictures.test:{origin.port}"
    ended: list[str] = []

    async def run() -> None:
        fetcher = Fetcher(
            parse_allowed_hosts([f"pictures.test:{origin.port}"]),
            MediaLimits(),
            FetchLimits(max_fetches=1, timeout=0.5),
            on_end=lambda outcome, seconds: ended.append(outcome),
            resolve=Names(["127.0.0.1"]),
            may_dial=lambda address: True,
        )
        first = asyncio.create_task(fetcher.fetch_all(sources(f"{url}/slow")))
        await asyncio.sleep(0.1)
        # Two wait: at most one of them gets its turn when the first has used up its time.
        others = [fetcher.fetch_all(sources(f"{url}/slow")) for _ in range(2)]
        results = await asyncio.gather(first, *others, return_exceptions=True)
        assert sum(isinstance(result, Overloaded) for result in results) >= 1
        (source,) = await fetcher.fetch_all(sources(f"{url}/picture.png"))  # turns come back
        assert source.fetched == PICTURE

    asyncio.run(run())
    assert "busy" in ended and ended[-1] == "ok"


def test_giving_up_closes_the_connection_and_gives_back_the_turn(origin: Origin) -> None:
    """Row 27, in one process: the client goes away while its images are being fetched."""
    origin.answers["/slow"] = drip(b"", 0.02, b"")
    url = f"http://pictures.test:{origin.port}"
    ended: list[str] = []

    async def run() -> None:
        fetcher = Fetcher(
            parse_allowed_hosts([f"pictures.test:{origin.port}"]),
            MediaLimits(),
            FetchLimits(max_fetches=1),
            on_end=lambda outcome, seconds: ended.append(outcome),
            resolve=Names(["127.0.0.1"]),
            may_dial=lambda address: True,
        )
        asked = asyncio.create_task(fetcher.fetch_all(sources(f"{url}/slow", f"{url}/slow")))
        while not origin.requests:
            await asyncio.sleep(0.01)
        asked.cancel()
        async with asyncio.timeout(1):
            with pytest.raises(asyncio.CancelledError):
                await asked
            while not origin.num_gone:
                await asyncio.sleep(0.01)
            await fetcher.fetch_all(sources(f"{url}/picture.png"))

    asyncio.run(run())
    assert sorted(ended) == ["cancelled", "cancelled", "ok"]


def test_an_image_that_fails_ends_the_fetches_of_the_others(origin: Origin) -> None:
    origin.answers["/slow"] = drip(b"", 0.02, b"")
    origin.answers["/late"] = slow(send(b"", 404), 0.2)
    ended: list[str] = []
    urls = [f"http://pictures.test:{origin.port}/{path}" for path in ("slow", "late", "slow")]
    began = time.perf_counter()
    with pytest.raises(RequestError, match="a status other than 200") as raised:
        fetch(origin, *urls, on_end=lambda outcome, seconds: ended.append(outcome))
    assert time.perf_counter() - began < 30
    assert raised.value.param == "1"
    assert ended == ["status", "cancelled", "cancelled"]


def test_nothing_is_fetched_of_requests_without_such_urls(origin: Origin) -> None:
    given: Sequence[Any] = sources(data_url(PICTURE), "file:///a.png", "nonsense")
    assert fetch(origin, *[source.url for source in given]) == given
    assert origin.num_hits == 0
