"""A client that leaves while it is queued, its image is encoded or its prompt is read. Row 27.

Leaving in other phases: test_media.py (fetching), test_disconnects.py (streaming, and waiting for a
whole answer).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from bystanders import SECOND, asking, leaving, undisturbed, wait_until_held
from checkpoints import make_llava
from pictures import data_url, encode, quarters
from serving import ServerProcess, wait_until
from wrong_plugins import edited

ROUTES = ("/v1/chat/completions", "/v1/responses")
COMPLETIONS = "/v1/completions"
ENCODING = """\
        if int(width[0]) > 50:
            say("encoding ")
            time.sleep(0.4)
            self.encodes = True
"""
READING = """\
        if len(input_ids) > 8 and not self.__dict__.pop("encodes", False):
            say("reading ")
            time.sleep(0.8)
"""
SAY = """

def say(phase):
    with open({file!r}, "a") as told:
        told.write(phase)
"""


@pytest.fixture(scope="module")
def phases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that is slow to encode wide images and to read long prompts, and says when.

    It runs two requests at once, and an answer can be long enough to keep others waiting.
    """
    folder = tmp_path_factory.mktemp("phases")
    plugin = folder / "slow.py"
    source = edited(("        # embed_images\n", ENCODING), ("        # forward\n", READING))
    plugin.write_text(source + SAY.format(file=str(folder / "phase")))
    changes = {"max_position_embeddings": 16384}
    model = make_llava(folder / "llava", text_changes=changes)
    flags = (
        *(str(model), "--plugin", str(plugin), "--kv-cache-memory", "16MiB", "--enforce-eager"),
        *("--max-num-batched-tokens", "32", "--max-decode-slowdown", "inf", "--max-num-seqs", "2"),
    )
    with ServerProcess(folder, *flags) as server:
        yield server


def body(
    route: str, phase: str, number: int, *, stream: bool, max_tokens: int = 15_000
) -> dict[str, Any]:
    """Another image, or text, each time: nothing is found in a cache."""
    common = {"stream": stream, "ignore_eos": True}
    url = data_url(encode(quarters(60 + number, 40)))
    text = f"{number} " + "a " * (0 if phase == "encoding" else 120)
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if phase == "encoding":
        parts.append({"type": "image_url", "image_url": {"url": url}})
    if route == ROUTES[0]:
        messages = [{"role": "user", "content": parts}]
        return {"messages": messages, "max_tokens": max_tokens, **common}
    own = [{"type": "input_text", "text": text}]
    if phase == "encoding":
        own.append({"type": "input_image", "image_url": url})
    said = [{"role": "user", "content": own}]
    return {"input": said, "max_output_tokens": max_tokens, **common}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("phase", ["encoding", "reading"])
def test_all_is_given_back_within_a_second(
    phases: ServerProcess, route: str, stream: bool, phase: str
) -> None:
    told = phases.log.with_name("phase")
    number = ROUTES.index(route) * 2 + stream
    short = body(route, phase, 10, stream=stream, max_tokens=4)
    assert phases.http.post(route, json=short).status_code == 200
    seconds = SECOND + (
        0.4 if phase == "encoding" else 0.8
    )  # with the step; all of its prompt are four
    with undisturbed(phases, new_rows=True):
        before, asked = told.read_text().count(phase), body(route, phase, number, stream=stream)
        with leaving(phases, route, asked, within=seconds):
            wait_until(lambda: told.read_text().count(phase) > before, f"it to be {phase}")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("route", [COMPLETIONS, *ROUTES])
def test_leaving_the_queue_frees_its_place(phases: ServerProcess, route: str, stream: bool) -> None:
    """Two others run, and the neighbour waits in the same queue."""
    long = {"prompt": "circle", "max_tokens": 15_000, "ignore_eos": True}
    text = {**long, "stream": stream}
    asked = text if route == COMPLETIONS else body(route, "queued", 0, stream=stream)
    held = {"num_requests_in_flight": 3, "num_queued_prompts": 3, "num_requests_running": 2}
    with undisturbed(phases), asking(phases, COMPLETIONS, long):
        wait_until_held(phases, num_requests_running=2)
        with asking(phases, COMPLETIONS, {**long, "stream": True}) as second:
            assert second.recv(100).startswith(b"HTTP/1.1 200"), "the neighbour has made room"
            wait_until_held(phases, num_requests_waiting=1, **held)
            with leaving(phases, route, asked, within=SECOND, num_others=3, max_blocks=math.inf):
                wait_until_held(phases, num_requests_waiting=2)
            wait_until_held(phases, num_requests_waiting=1, **held)  # none of the others has gone
