"""A client that leaves while its image is encoded or its prompt is read. Row 27.

Leaving in other phases: test_limits.py (queued), test_media.py (fetching), test_disconnects.py
(streaming, and waiting for a whole answer).
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bystanders import undisturbed
from pictures import data_url, encode, quarters
from serving import ServerProcess, wait_until
from wrong_plugins import edited

ROUTES = ("/v1/chat/completions", "/v1/responses")


@pytest.fixture(scope="module")
def phases(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that is slow to encode wide images and to read long prompts, and says when."""
    folder = tmp_path_factory.mktemp("phases")
    note = f"Path({str(folder / 'phase')!r}).open('a').write"
    encoding = f"        if int(width[0]) > 50: {note}('encoding '); time.sleep(0.4)\n"
    reading = f"        if len(input_ids) > 8: {note}('reading '); time.sleep(0.8)\n"
    plugin = folder / "slow.py"
    source = edited(("        # embed_images\n", encoding), ("        # forward\n", reading))
    plugin.write_text("from pathlib import Path\n" + source)
    flags = (
        *(str(llava), "--plugin", str(plugin), "--kv-cache-memory", "16MiB", "--enforce-eager"),
        *("--max-num-batched-tokens", "32", "--max-decode-slowdown", "inf"),
    )
    with ServerProcess(folder, *flags) as server:
        yield server


def body(route: str, phase: str, number: int, *, stream: bool) -> dict[str, Any]:
    """Another image, or text, each time: nothing is found in a cache."""
    url = data_url(encode(quarters(60 + number, 40)))
    text = f"{number} " + "a " * (0 if phase == "encoding" else 120)
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if phase == "encoding":
        parts.append({"type": "image_url", "image_url": {"url": url}})
    if route == ROUTES[0]:
        messages = [{"role": "user", "content": parts}]
        return {"messages": messages, "max_tokens": 4, "stream": stream}
    own = [{"type": "input_text", "text": text}]
    if phase == "encoding":
        own.append({"type": "input_image", "image_url": url})
    return {
        "input": [{"role": "user", "content": own}],
        "max_output_tokens": 4,
        "stream": stream,
    }


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("phase", ["encoding", "reading"])
def test_all_is_given_back_within_a_second(
    phases: ServerProcess, route: str, stream: bool, phase: str
) -> None:
    told = phases.log.with_name("phase")
    host, port = phases.url.removeprefix("http://").split(":")
    number = ROUTES.index(route) * 2 + stream
    assert phases.http.post(route, json=body(route, phase, 10, stream=stream)).status_code == 200
    with undisturbed(phases, new_rows=True):
        before, start = told.read_text().count(phase), len(phases.output)
        content = json.dumps(body(route, phase, number, stream=stream)).encode()
        head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + content)
            wait_until(lambda: told.read_text().count(phase) > before, f"it to be {phase}")
            left = time.monotonic()
        line = f"POST {route} 499"
        wait_until(lambda: line in phases.output[start:], "its line in the log")
        name = "mm_engine_num_requests_running"
        wait_until(lambda: phases.metric(name) <= 1, "none but the neighbour to run")
        # With the step that it was in; all of its prompt takes four.
        assert time.monotonic() - left < 1.0 + (0.4 if phase == "encoding" else 0.8)
