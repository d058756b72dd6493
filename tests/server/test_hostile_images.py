"""Pictures of sizes nobody expects, over HTTP and with both demos' plugins. Rows 1, 2, 4, 5, 22."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image, ImageOps

from bystanders import check_error, undisturbed
from pictures import data_url, encode, png_of_size, quarters
from serving import FLAGS, ServerProcess, sse_events, wait_until

CHAT = "/v1/chat/completions"
both = pytest.mark.parametrize("name", ["server", "tiled"])


@pytest.fixture(scope="module")
def tiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with the demo of the plugin whose images take as many tokens as they are large."""
    with ServerProcess(tmp_path_factory.mktemp("tiled"), "llava-next-demo", *FLAGS) as started:
        yield started


@pytest.fixture
def served(name: str, request: pytest.FixtureRequest) -> ServerProcess:
    found: ServerProcess = request.getfixturevalue(name)
    return found


def body(*urls: str, **fields: Any) -> dict[str, Any]:
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}} for url in urls
    ]
    content.append({"type": "text", "text": "What is it?"})
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "max_tokens": 6, "temperature": 0, "ignore_eos": True, **fields}


def text_of(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def text_of_stream(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    events = [json.loads(e) for e in sse_events(iter(reply.text.splitlines())) if e != "[DONE]"]
    assert not [event for event in events if "error" in event]
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


SIZES = [(1, 1), (1, 2), (3, 500), (500, 3), (13, 13), (1, 4000), (4000, 1), (2, 30_000)]


@both
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_a_picture_of_any_shape_is_seen_or_refused_before_a_stream(
    served: ServerProcess, size: tuple[int, int]
) -> None:
    """Row 1: 200 with tokens of the image in the prompt, or 400; the same streamed and not."""
    num_text = served.http.post(CHAT, json=body()).json()["usage"]["prompt_tokens"]
    picture = quarters(*size) if min(size) > 1 else Image.new("RGB", size, (250, 10, 10))
    request = body(data_url(encode(picture)))
    with undisturbed(served, new_rows=True):
        whole = served.http.post(CHAT, json=request)
        streamed = served.http.post(CHAT, json={**request, "stream": True})
        assert streamed.status_code == whole.status_code
        if whole.status_code == 200:
            usage = whole.json()["usage"]
            assert usage["prompt_tokens"] >= num_text + 1
            counted = served.http.post("/tokenize", json={"messages": request["messages"]})
            assert counted.json()["count"] == usage["prompt_tokens"]
            assert text_of(whole) == text_of_stream(streamed)
        else:
            check_error(whole, 400, "messages")
            check_error(streamed, 400, "messages")


@both
def test_a_picture_as_people_take_them_is_seen(served: ServerProcess) -> None:
    """The positive control: it is 200, and another picture is another answer's prompt."""
    replies = [
        served.http.post(CHAT, json=body(data_url(encode(picture)), logprobs=True))
        for picture in (quarters(96, 64), Image.new("RGB", (96, 64), (10, 250, 10)))
    ]
    first, second = (reply.json()["choices"][0]["logprobs"]["content"] for reply in replies)
    assert [t["logprob"] for t in first] != [t["logprob"] for t in second]


@both
def test_a_small_file_that_declares_much_costs_no_memory(served: ServerProcess) -> None:
    """Row 2: 1.2 GB of pixels if it were believed."""
    process = psutil.Process(served.process.pid)
    declared = body(data_url(png_of_size(20_000, 20_000)))
    check_error(served.http.post(CHAT, json=declared), 400)  # once, for what is imported then
    before, most = process.memory_info().rss, 0
    with undisturbed(served), ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(served.http.post, CHAT, json=declared) for _ in range(20)]
        while not all(one.done() for one in asked):
            most = max(most, process.memory_info().rss)
            time.sleep(0.002)
        for one in asked:
            check_error(one.result(), 400, "messages.0.content.0.image_url")
    assert most - before < 50 * 2**20


@both
def test_of_thousands_of_frames_the_first_is_seen_in_no_time(served: ServerProcess) -> None:
    """Row 4: and only that one counts."""
    first = quarters(60, 40)
    others = [Image.new("RGB", (60, 40), (i % 256, i // 256, 99)) for i in range(3000)]
    animated = encode(first, "GIF", save_all=True, append_images=others, loop=0)
    still = encode(first, "GIF")
    assert len(animated) > 100 * len(still)
    expected = served.http.post(CHAT, json=body(data_url(still, "image/gif")))
    hits = served.metric("mm_engine_mm_cache_hits_total")
    with undisturbed(served):
        start = time.monotonic()
        reply = served.http.post(CHAT, json=body(data_url(animated, "image/gif")))
        assert time.monotonic() - start < 30
    assert text_of(reply) == text_of(expected)
    assert served.metric("mm_engine_mm_cache_hits_total") == hits + 1, "the same pixels"


@both
def test_a_turned_picture_is_the_one_that_was_meant(served: ServerProcess) -> None:
    """Row 5: by the content key of what the plugin gets, which is over pixels."""

    def is_known(picture: bytes, mime: str = "image/png") -> bool:
        before = served.metric("mm_engine_mm_cache_hits_total")
        assert served.http.post(CHAT, json=body(data_url(picture, mime))).status_code == 200
        return served.metric("mm_engine_mm_cache_hits_total") == before + 1

    for orientation in range(1, 9):
        base = quarters(50 + 2 * orientation, 34)  # another each time: only `meant` is known
        exif = Image.Exif()
        exif[0x0112] = orientation
        turned = encode(base, exif=exif)
        meant = encode(ImageOps.exif_transpose(Image.open(io.BytesIO(turned))))
        assert not is_known(meant), orientation
        assert is_known(turned), orientation


@both
@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA", "1", "I;16", "CMYK"])
def test_pictures_of_any_mode_are_answered(served: ServerProcess, mode: str) -> None:
    """Row 5: as what they become is one defined way, in tests/inputs/test_media.py."""
    base = quarters(48, 48)
    picture = base.convert("L").convert("I").convert("I;16") if mode == "I;16" else None
    kind = "JPEG" if mode == "CMYK" else "PNG"
    encoded = encode(picture or base.convert(mode), kind)
    request = body(data_url(encoded, f"image/{kind.lower()}"))
    whole = served.http.post(CHAT, json=request)
    streamed = served.http.post(CHAT, json={**request, "stream": True})
    assert text_of(whole) == text_of_stream(streamed)


@both
@pytest.mark.parametrize("order", ["aba", "bab"])
def test_pictures_one_after_another_and_at_once_are_answered_each_for_itself(
    served: ServerProcess, order: str
) -> None:
    """Row 22: the same text; the second time it is found, and it changes nothing."""
    urls = {
        "a": data_url(encode(quarters(88, 72))),
        "b": data_url(encode(Image.new("RGB", (88, 72), (10, 250, 10)))),
    }

    def ask(letter: str, salt: str) -> tuple[str, list[float], int]:
        request = body(urls[letter], cache_salt=f"{order} {salt}", logprobs=True)
        reply = served.http.post(CHAT, json=request).json()
        content = reply["choices"][0]["logprobs"]["content"]
        found = reply["usage"]["prompt_tokens_details"]["cached_tokens"]
        text = str(reply["choices"][0]["message"]["content"])
        return text, [token["logprob"] for token in content], found

    alone = {letter: ask(letter, f"alone {letter}") for letter in "ab"}
    assert alone["a"][1] != pytest.approx(alone["b"][1], abs=1e-3), "pictures make a difference"
    assert [alone[letter][2] for letter in "ab"] == [0, 0]
    one_by_one = [ask(letter, "in turn") for letter in order]
    with ThreadPoolExecutor(3) as pool:
        at_once = list(pool.map(lambda letter: ask(letter, "at once"), order))
    for letter, *answers in zip(order, one_by_one, at_once, strict=True):
        for text, logprobs, _ in answers:
            assert text == alone[letter][0]
            assert logprobs == pytest.approx(alone[letter][1], abs=1e-4)
    assert one_by_one[2][2] >= 16, "the second time, its picture is found"
    assert one_by_one[1][2] < one_by_one[2][2]
    wait_until(lambda: served.is_idle, "everything given back")


@both
def test_a_prompt_cut_inside_an_image_is_refused(served: ServerProcess) -> None:
    """Row 19: ids without their picture, wherever they are cut; and no field cuts a prompt."""
    request = body(data_url(encode(quarters(48, 48))))
    ids = served.http.post("/tokenize", json={"messages": request["messages"]}).json()["tokens"]
    placeholder = max(set(ids), key=ids.count)
    first, num = ids.index(placeholder), ids.count(placeholder)
    assert num > 8 and ids[first : first + num] == [placeholder] * num
    with undisturbed(served):
        for prompt in (ids, ids[: first + num // 2], ids[first + num // 2 :], ids[: first + 1]):
            asked = {"prompt": prompt, "max_tokens": 2}
            check_error(served.http.post("/v1/completions", json=asked), 400, "prompt")
        cut = {**request, "truncate_prompt_tokens": first + num // 2}
        check_error(served.http.post(CHAT, json=cut), 400, "truncate_prompt_tokens")
    without = {"prompt": ids[:first], "max_tokens": 2}
    assert served.http.post("/v1/completions", json=without).status_code == 200
    assert served.http.post(CHAT, json=request).status_code == 200
