"""Images of other hosts and of files, asked for over HTTP from a server in a process of its own."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bystanders import SECOND, leaving, undisturbed, wait_until_held
from mm_engine.server import service
from origins import PICTURE, Origin, drip, redirect, send
from pictures import data_url
from serving import FLAGS, ServerProcess, wait_until

CHAT = "/v1/chat/completions"


def chat(url: str) -> dict[str, Any]:
    """A question about an image."""
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What colour is it?"},
    ]
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "max_tokens": 4, "temperature": 0}


def response(url: str) -> dict[str, Any]:
    """The same question as a response's input."""
    content = [
        {"type": "input_image", "image_url": url},
        {"type": "input_text", "text": "What colour is it?"},
    ]
    said = [{"role": "user", "content": content}]
    return {"input": said, "max_output_tokens": 4, "temperature": 0}


def tokens(url: str) -> dict[str, Any]:
    """The same messages, to be counted."""
    return {"messages": chat(url)["messages"]}


#: Each route that takes an image, and a body for it.
ROUTES: dict[str, Callable[[str], dict[str, Any]]] = {
    CHAT: chat,
    "/v1/responses": response,
    "/tokenize": tokens,
}

every_route = pytest.mark.parametrize("route", ROUTES)


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    answers = {
        "/cached.png": send(PICTURE),
        "/silent.png": drip(b"", 0.02, b""),
        "/not.png": send(b"<html>secret</html>"),
        "/long.png": send(b"x" * (10 * 2**20 + 1)),
        "/endless.png": drip(b"HTTP/1.1 200 OK\r\n\r\n", 0, b"x" * 65536),
    }
    with Origin(answers) as started:
        yield started


@pytest.fixture(scope="module")
def other() -> Iterator[Origin]:
    """A server that nobody has named."""
    with Origin() as started:
        yield started


@pytest.fixture(scope="module")
def fetching(origin: Origin, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that may fetch from a host on this machine, which no flag can allow."""
    settings = {
        "allowed_media_domains": (f"localhost:{origin.port}",),
        "private_media_networks": ("127.0.0.0/8", "::1/128"),
    }
    folder = tmp_path_factory.mktemp("fetching")
    with ServerProcess(folder, settings=settings, config={"dtype": "float32"}) as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a picture, beside one that isn't in it."""
    outside = tmp_path_factory.mktemp("media")
    inside = outside / "allowed"
    (outside / "allowed-not-really").mkdir()
    inside.mkdir()
    for place in (outside, inside, outside / "allowed-not-really"):
        (place / "picture.png").write_bytes(PICTURE)
    (inside / "out.png").symlink_to(outside / "picture.png")
    return inside


#: This machine as an operator might name it, all of them pointing at one listener.
SPELLINGS = (
    *("localhost", "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.0.0.1", "0", "0.0.0.0"),
    *("[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::1]", "[::]", "[64:ff9b::7f00:1]"),
    *("169.254.169.254", "10.0.0.1", "192.168.0.1", "[fd00:ec2::254]", "[fe80::1]"),
)


@pytest.fixture(scope="module")
def guarded(
    origin: Origin, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server as the flags make it: private hosts are named, one of them with commas."""
    domains = [f"{host}:{origin.port}" for host in SPELLINGS]
    flags = [
        *("--allowed-media-domains", ",".join(domains[:-1])),
        *("--allowed-media-domains", domains[-1]),
        *("--allowed-local-media-path", str(folder)),
    ]
    with ServerProcess(tmp_path_factory.mktemp("guarded"), *FLAGS, *flags) as started:
        yield started


def ask(server: ServerProcess, url: str, route: str = CHAT) -> tuple[int, str]:
    """Status, and the error's message or the answer's body."""
    response = server.http.post(route, json=ROUTES[route](url))
    body = response.json()
    if response.status_code != 200:
        assert set(body["error"]) == {"message", "type", "param", "code"}
        return response.status_code, body["error"]["message"]
    return 200, json.dumps(body.get("choices") or body)


def test_routes_with_images_are_those_that_are_tested(server: ServerProcess) -> None:
    """Row 11."""
    document = server.http.get("/openapi.json").json()
    found = set()
    for path, methods in document["paths"].items():
        waiting = [methods.get("post", {}).get("requestBody", {})]
        seen: set[str] = set()
        while waiting:
            text = json.dumps(waiting.pop())
            if "image_url" in text or "input_image" in text:
                found.add(path)
            for name, schema in document["components"]["schemas"].items():
                if f'"#/components/schemas/{name}"' in text and name not in seen:
                    seen.add(name)
                    waiting.append(schema)
    assert found == set(ROUTES)


def test_images_have_one_way_into_the_server() -> None:
    """Row 11: what reads and decodes them is called in one place, behind the guard."""
    folder = Path(str(service.__file__)).parent
    users = {
        path.name
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Name)
        and node.id in ("load_images", "decode_image", "read_data_url", "Fetcher", "MediaFolder")
    }
    assert users == {"service.py"}


@every_route
def test_a_picture_elsewhere_is_answered_like_the_same_in_the_request(
    fetching: ServerProcess, origin: Origin, route: str
) -> None:
    """Rows 7 and 11, the positive control: fetching is on, and the listener is there."""
    before, num_hits = fetched(fetching, "ok"), origin.num_hits
    answers = [
        ask(fetching, url, route)
        for url in (data_url(PICTURE), f"http://localhost:{origin.port}/picture.png")
    ]
    assert answers[0][0] == 200
    assert strip_ids(answers[0][1]) == strip_ids(answers[1][1])
    assert origin.num_hits == num_hits + 1
    assert fetched(fetching, "ok") == before + 1
    assert fetching.metric("mm_engine_media_fetch_seconds_count") >= 1


def strip_ids(text: str) -> Any:
    told = json.loads(text)
    if isinstance(told, list):
        return told[0]["message"]
    return told["tokens"] if "tokens" in told else told["output"][0]["content"]


def fetched(server: ServerProcess, outcome: str) -> float:
    return server.metric(f'mm_engine_media_fetches_total{{outcome="{outcome}"}}')


@every_route
@pytest.mark.parametrize("host", SPELLINGS)
def test_this_machine_and_its_networks_are_refused_in_any_spelling(
    guarded: ServerProcess, origin: Origin, host: str, route: str
) -> None:
    """Row 7: though the flag names them."""
    before, num_hits = fetched(guarded, "address"), origin.num_hits
    status, message = ask(guarded, f"http://{host}:{origin.port}/picture.png?secret", route)
    assert status == 400
    assert message.startswith("the image's host has an address that isn't public")
    assert origin.num_hits == num_hits
    assert fetched(guarded, "address") == before + 1


@every_route
@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{other}/picture.png",
        "http://localhost:{other}/picture.png",
        "http://localhost/picture.png",
        "http://0177.0.0.1:{port}/picture.png",
        "http://localhost.:{port}@127.0.0.1:{other}/picture.png",
        "http://secret@localhost:{port}/picture.png",
        "http://localhost:{port}\\@127.0.0.1:{other}/",
        "https://example.com/secret.png",
        "http://[::1",
    ],
)
def test_hosts_that_were_not_named_are_refused(
    fetching: ServerProcess, origin: Origin, other: Origin, url: str, route: str
) -> None:
    """Row 7: other hosts, and other ports of the one that was named."""
    num_hits = origin.num_hits
    status, message = ask(fetching, url.format(port=origin.port, other=other.port), route)
    assert status == 400
    assert message.startswith("the image's URL ")
    assert "secret" not in message and "localhost" not in message
    assert (origin.num_hits, other.num_hits) == (num_hits, 0)


@every_route
@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:{other}/picture.png",
        "http://localhost:{other}/picture.png",
        "http://elsewhere.invalid/secret.png",
        "https://localhost/picture.png",
        "file://{folder}/picture.png",
        data_url(PICTURE),
    ],
)
def test_redirects_elsewhere_are_refused(
    fetching: ServerProcess,
    origin: Origin,
    other: Origin,
    folder: Path,
    location: str,
    route: str,
) -> None:
    """Row 8: the target counts zero hits; one to the same host is followed."""
    base = f"http://localhost:{origin.port}"
    origin.answers["/away"] = redirect(location.format(other=other.port, folder=folder))
    origin.answers["/on"] = redirect(f"{base}/picture.png")
    status, message = ask(fetching, f"{base}/away", route)
    assert status == 400
    assert message.startswith("the image's URL redirects too often, or to where")
    assert other.num_hits == 0
    assert ask(fetching, f"{base}/on", route)[0] == 200


@every_route
def test_what_is_fetched_is_held_to_the_limits_of_images(
    fetching: ServerProcess, origin: Origin, route: str
) -> None:
    """Row 9."""
    base = f"http://localhost:{origin.port}"
    for path in ("long.png", "endless.png"):
        status, message = ask(fetching, f"{base}/{path}", route)
        assert (status, message[:32]) == (400, "the image is over 10485760 bytes")
    status, message = ask(fetching, f"{base}/not.png", route)
    assert (status, message[:33]) == (400, "the data is not a PNG, JPEG, WebP")
    assert "secret" not in fetching.output


@every_route
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_the_fetch_of_its_images(
    fetching: ServerProcess, origin: Origin, route: str, stream: bool
) -> None:
    """Row 27: within a second its connection, its place in the queue and its fetch are gone."""
    body = {**ROUTES[route](f"http://localhost:{origin.port}/silent.png"), "stream": stream}
    before, num_gone = fetched(fetching, "cancelled"), origin.num_gone
    num_asked = len(origin.requests)

    def is_given_up() -> bool:
        return origin.num_gone > num_gone and fetched(fetching, "cancelled") == before + 1

    with undisturbed(fetching), leaving(fetching, route, body, within=SECOND, also=is_given_up):
        wait_until(lambda: len(origin.requests) > num_asked, "the image to be asked for")
        wait_until_held(fetching, num_requests_in_flight=2, num_queued_prompts=2)


@every_route
def test_without_the_flags_nothing_is_fetched_or_read(
    server: ServerProcess, other: Origin, folder: Path, route: str
) -> None:
    """Rows 7 and 10: the default."""
    url = f"http://127.0.0.1:{other.port}/picture.png"
    assert ask(server, url, route)[1].startswith("remote image URLs are off")
    url = f"file://{folder}/picture.png"
    assert ask(server, url, route)[1].startswith("local image files are off")
    assert ask(server, data_url(PICTURE), route)[0] == 200
    assert other.num_hits == 0


@every_route
def test_files_of_the_folder_are_taken_and_others_are_not(
    guarded: ServerProcess, folder: Path, route: str
) -> None:
    """Row 10, over HTTP; every way out is tried in the tests of `MediaFolder`."""
    same = strip_ids(ask(guarded, data_url(PICTURE), route)[1])
    assert strip_ids(ask(guarded, f"file://{folder}/picture.png", route)[1]) == same
    for path in (
        f"{folder}/../picture.png",
        f"{folder}/%2e%2e/picture.png",
        f"{folder}/out.png",
        f"{folder}-not-really/picture.png",
        "/etc/passwd",
        "/dev/zero",
    ):
        status, message = ask(guarded, f"file://{path}", route)
        assert (status, message[:34]) == (400, "the image is no file in the folder"), path
        assert "picture" not in message
    assert str(folder) not in guarded.output


SPY_PLUGIN = """
from pathlib import Path
from mm_engine.plugins import expand_placeholders, hookimpl, placeholder_token_id
from mm_llava.counts import num_image_tokens
from mm_llava.plugin import max_tokens, model_class


@hookimpl
def input_processor(ctx, inputs):
    images = inputs.multi_modal_data["image"]
    with Path({seen!r}).open("a") as file:
        for image in images:
            told = [name for name in ("filename", "fp", "url") if getattr(image, name, None)]
            told += [word for word in ("file:", "data:", "allowed") if word in repr(inputs)]
            file.write(f"{{type(image).__qualname__}} {{image.mode}} {{image.size}} {{told}}\\n")
    count = num_image_tokens(ctx.hf_config)
    return expand_placeholders(inputs, placeholder_token_id(ctx), [count] * len(images))
"""


def test_a_plugin_gets_pixels_and_never_a_url_or_a_path(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Row 11: whatever way the picture came."""
    place = tmp_path_factory.mktemp("spy")
    seen, file = place / "seen", place / "spy.py"
    file.write_text(SPY_PLUGIN.format(seen=str(seen)))
    flags = ("--plugin", str(file), "--allowed-local-media-path", str(folder))
    with ServerProcess(place, *FLAGS, *flags) as server:
        seen.write_text("")  # the dummy data has been there
        for url in (data_url(PICTURE), f"file://{folder}/picture.png"):
            assert ask(server, url)[0] == 200
    assert seen.read_text().splitlines() == ["Image RGB (24, 16) []"] * 2
