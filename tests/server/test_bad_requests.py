"""Bad input: the stated status, OpenAI's shape, the field's name, and nothing of the input itself.

Each table has a positive control: the request that every case changes in one place is answered.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bad_fields import DETOKENIZE_FIELDS, RESPONSE_FIELDS, TOKENIZE_FIELDS, items
from pictures import data_url, encode, png_of_size, quarters
from serving import ServerProcess, sse_events, wait_until

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, TOKENIZE, DETOKENIZE = "/v1/responses", "/tokenize", "/detokenize"
SECRET = "s3cr3t"
ROOT = str(Path(__file__).parents[2])  # where the sources lie
PICTURE = encode(quarters(96, 96))


def message(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def image(url: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


TEXT = {"type": "text", "text": SECRET}
GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"messages": message(image(data_url(PICTURE)), TEXT), "max_tokens": 2},
    COMPLETIONS: {"prompt": SECRET, "max_tokens": 2},
    RESPONSES: {"input": items(image(data_url(PICTURE)), TEXT), "max_output_tokens": 2},
    TOKENIZE: {"messages": message(image(data_url(PICTURE)), TEXT)},
    DETOKENIZE: {"tokens": [1, 2, 3]},
}
#: The field that holds the messages, and what makes it of a chat's parts.
MESSAGES = {
    CHAT: ("messages", message),
    RESPONSES: ("input", items),
    TOKENIZE: ("messages", message),
}
JPEG = encode(quarters(), "JPEG")


def check_error(response: Any, status: int, param: str | None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["message"].endswith((".", "…", ")"))
    for part in (SECRET, "Traceback", "site-packages", ROOT, "0x7", ".py"):
        assert part not in response.text
    return dict(error)


@pytest.mark.parametrize("route", GOOD)
def test_the_request_that_the_cases_change_is_answered(server: ServerProcess, route: str) -> None:
    assert server.http.post(route, json=GOOD[route]).status_code == 200


FIELDS: list[tuple[str, Any, str]] = [  # field, value, the `param` of the answer
    ("n", 0, "n"),
    ("n", -1, "n"),
    ("n", 10**6, "n"),
    ("n", "2", "n"),
    ("n", 1.5, "n"),
    ("n", True, "n"),
    ("temperature", -0.1, "temperature"),
    ("temperature", "0", "temperature"),
    ("temperature", True, "temperature"),
    ("temperature", [], "temperature"),
    ("top_p", 0, "top_p"),
    ("top_p", 1.01, "top_p"),
    ("top_k", -2, "top_k"),
    ("top_k", 10**30, "top_k"),
    ("min_p", 2, "min_p"),
    ("seed", 2**63, "seed"),
    ("seed", 0.5, "seed"),
    ("presence_penalty", 3, "presence_penalty"),
    ("frequency_penalty", -3, "frequency_penalty"),
    ("repetition_penalty", 0, "repetition_penalty"),
    ("max_tokens", 0, "max_tokens"),
    ("max_tokens", -5, "max_tokens"),
    ("max_tokens", 10**9, "max_tokens"),
    ("max_tokens", 10**40, "max_tokens"),
    ("max_tokens", "5", "max_tokens"),
    ("min_tokens", -1, "min_tokens"),
    ("min_tokens", 3, "min_tokens"),
    ("stop", ["x"] * 17, "stop"),
    ("stop", [""], "stop"),
    ("stop", "x" * 257, "stop"),
    ("stop", 5, "stop"),
    ("stop", [5], "stop.0"),
    ("stop_token_ids", [-1], "stop_token_ids.0"),
    ("stop_token_ids", [10**6], "stop_token_ids"),
    ("logit_bias", {"1": 101}, "logit_bias"),
    ("logit_bias", {"x": 1}, "logit_bias.x"),
    ("logit_bias", {"99999999": 1}, "logit_bias"),
    ("logit_bias", [1], "logit_bias"),
    ("stream", "yes", "stream"),
    ("stream_options", {"include_usage": True}, "stream_options"),
    ("model", 5, "model"),
    ("best_of", 2, "best_of"),
    ("response_format", {"type": "yaml"}, "response_format"),
    ("guided_regex", "(a", "guided_regex"),
    ("structured_outputs", {"json": {"not": {}}}, "structured_outputs"),
    ("prompt_logprobs", 1, "prompt_logprobs"),
    ("use_beam_search", True, "use_beam_search"),
]
CHAT_FIELDS: list[tuple[str, Any, str]] = [
    ("logprobs", 5, "logprobs"),
    ("top_logprobs", 3, "top_logprobs"),
    ("max_completion_tokens", 0, "max_completion_tokens"),
    ("tools", [{"type": "function"}], "tools.0.function"),
    ("tool_choice", "auto", "tool_choice"),
    ("functions", [{}], "functions"),
    ("audio", {"voice": "x"}, "audio"),
    ("modalities", ["text", "audio"], "modalities"),
    ("chat_template", "{{ x }}", "chat_template"),
    ("messages", [], "messages"),
    ("messages", None, "messages"),
    ("messages", SECRET, "messages"),
    ("messages", [{"content": "x"}], "messages.0.role"),
    ("messages", [{"role": "function", "content": "x"}], "messages.0.role"),
    ("messages", [{"role": "user"}], "messages.0.content"),
    ("messages", [{"role": "user", "content": 5}], "messages.0.content"),
    ("messages", message({"type": "video_url"}), "messages.0.content.0"),
    ("messages", message({"text": "x"}), "messages.0.content.0"),
    ("messages", message(TEXT, {"type": "text"}), "messages.0.content.1.text"),
    ("messages", message({"type": "image_url"}), "messages.0.content.0.image_url"),
    ("messages", message(image(5)), "messages.0.content.0.image_url.url"),
]
COMPLETION_FIELDS: list[tuple[str, Any, str]] = [
    ("logprobs", 21, "logprobs"),
    ("logprobs", True, "logprobs"),
    ("echo", "x", "echo"),
    ("suffix", "x", "suffix"),
    ("prompt", None, "prompt"),
    ("prompt", "", "prompt"),
    ("prompt", [], "prompt"),
    ("prompt", [[]], "prompt"),
    ("prompt", ["x", ""], "prompt"),
    ("prompt", [1, "x"], "prompt"),
    ("prompt", [1.5], "prompt"),
    ("prompt", [True], "prompt"),
    ("prompt", [-1], "prompt"),
    ("prompt", [10**6], "prompt"),
    ("prompt", [1] * 5000, "prompt"),
    ("prompt", "x " * 20_000, "prompt"),
    ("prompt", ["x"] * 2000, "prompt"),
    ("prompt", ["x"] * 1025, "prompt"),
    ("prompt", "<image> what?", "prompt"),
    ("prompt", {"text": "x"}, "prompt"),
]
CASES = [
    *((CHAT, *case) for case in FIELDS + CHAT_FIELDS),
    *((COMPLETIONS, *case) for case in FIELDS + COMPLETION_FIELDS),
    *((RESPONSES, *case) for case in FIELDS + RESPONSE_FIELDS),
    *((TOKENIZE, *case) for case in TOKENIZE_FIELDS),
    *((DETOKENIZE, *case) for case in DETOKENIZE_FIELDS),
]


@pytest.mark.parametrize(
    ("route", "field", "value", "param"),
    CASES,
    ids=[f"{r.removeprefix('/v1/').split('/')[0]}-{f}={repr(v)[:24]}" for r, f, v, _ in CASES],
)
def test_a_bad_field_is_refused_by_name(
    server: ServerProcess, route: str, field: str, value: Any, param: str
) -> None:
    check_error(server.http.post(route, json={**GOOD[route], field: value}), 400, param)


IMAGES: dict[str, str] = {
    "remote": "https://example.com/s3cr3t.png",
    "loopback": "http://127.0.0.1:1/s3cr3t",
    "file": "file:///etc/s3cr3t",
    "path": "/etc/s3cr3t",
    "empty": "",
    "empty data URL": "data:image/png;base64,",
    "not base64": "data:image/png,s3cr3t",
    "bad base64": "data:image/png;base64,s3cr3t!",
    "random bytes": data_url(b"s3cr3t" * 50),
    "text": data_url(b"s3cr3t", "text/plain"),
    "another type": data_url(JPEG, "image/png"),
    "truncated": data_url(PICTURE[:-40]),
    "no pixels": data_url(PICTURE[:60]),
    "trailing": data_url(PICTURE + b"s3cr3t"),
    "corrupt inside": data_url(png_of_size(300, 300)),
    "huge by its header": data_url(png_of_size(20_000, 20_000)),
    "over 10 MB": data_url(PICTURE + b"\0" * 10 * 2**20),
}


def said(route: str, *parts: Any, **fields: Any) -> dict[str, Any]:
    """The route's good body with another message."""
    field, made = MESSAGES[route]
    return {**GOOD[route], field: made(*parts), **fields}


@pytest.mark.parametrize("case", IMAGES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("route", MESSAGES)
def test_a_bad_image_is_refused(server: ServerProcess, route: str, case: str, stream: bool) -> None:
    request = said(route, image(IMAGES[case]), TEXT, stream=stream)
    param = f"{MESSAGES[route][0]}.0.content.0.image_url"
    check_error(server.http.post(route, json=request), 400, param)


@pytest.mark.parametrize("route", MESSAGES)
def test_the_last_image_of_many_is_named(server: ServerProcess, route: str) -> None:
    request = said(route, image(data_url(PICTURE)), TEXT, image(data_url(PICTURE[:50])))
    param = f"{MESSAGES[route][0]}.0.content.2.image_url"
    check_error(server.http.post(route, json=request), 400, param)
    if route == RESPONSES:  # a message before them doesn't count as one of the input's
        check_error(server.http.post(route, json={**request, "instructions": "x"}), 400, param)


@pytest.mark.parametrize("route", MESSAGES)
def test_as_many_images_as_allowed_are_taken_and_no_more(server: ServerProcess, route: str) -> None:
    picture = image(data_url(PICTURE))
    assert server.http.post(route, json=said(route, *[picture] * 8)).is_success
    response = server.http.post(route, json=said(route, *[picture] * 9))
    check_error(response, 400, MESSAGES[route][0])


@pytest.mark.parametrize("route", MESSAGES)
def test_images_that_are_too_large_together_are_refused(server: ServerProcess, route: str) -> None:
    picture = image(data_url(png_of_size(5000, 6000)))  # 30 megapixels, corrupt inside
    response = server.http.post(route, json=said(route, picture, picture, picture))
    error = check_error(response, 400, f"{MESSAGES[route][0]}.0.content.2.image_url")
    assert "too many pixels" in error["message"]


BODIES: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"s3cr3t",
    "cut off": b'{"messages": [',
    "a list": b"[]",
    "a string": b'"s3cr3t"',
    "null": b"null",
    "not UTF-8": b'{"messages": "\xff"}',
    "lone surrogate": b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "not a number": b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    "deep": b'{"messages":' + b"[" * 200_000,
    "deep and closed": b"[" * 5000 + b"]" * 5000,
}


@pytest.mark.parametrize("case", BODIES)
@pytest.mark.parametrize("route", GOOD)
def test_a_bad_body_is_refused(server: ServerProcess, route: str, case: str) -> None:
    check_error(server.http.post(route, content=BODIES[case]), 400, None)


def test_infinity_is_no_temperature(server: ServerProcess) -> None:
    body = json.dumps({**GOOD[CHAT], "temperature": 0.5}).replace("0.5", "1e999")
    check_error(server.http.post(CHAT, content=body), 400, "temperature")


@pytest.mark.parametrize("route", GOOD)
def test_another_model_is_404(server: ServerProcess, route: str) -> None:
    assert server.http.post(route, json={**GOOD[route], "model": "demo"}).status_code == 200
    error = check_error(
        server.http.post(route, json={**GOOD[route], "model": SECRET}), 404, "model"
    )
    assert error["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/docs", 404),
        ("GET", "/v1", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/../etc/s3cr3t", 404),
        ("GET", "/v1/models/s3cr3t", 404),
        ("GET", CHAT, 405),
        ("PUT", COMPLETIONS, 405),
        ("PUT", RESPONSES, 405),
        ("GET", TOKENIZE, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
    ],
)
def test_unknown_routes_and_methods_have_the_same_shape(
    server: ServerProcess, method: str, path: str, status: int
) -> None:
    response = server.http.request(method, path)
    check_error(response, status, "model" if "/models/" in path else None)
    assert ("allow" in response.headers) == (status == 405)


def test_what_is_refused_is_refused_before_a_stream_of_events_starts(server: ServerProcess) -> None:
    request = {**GOOD[RESPONSES], "stream": True}
    with server.http.stream("POST", RESPONSES, json=request) as response:
        assert "event: response.incomplete" in list(response.iter_lines())
    check_error(
        server.http.post(RESPONSES, json={**request, "max_output_tokens": 10**6}),
        400,
        "max_output_tokens",
    )


def test_what_is_refused_is_refused_before_a_stream_starts(server: ServerProcess) -> None:
    request = {**GOOD[COMPLETIONS], "stream": True}
    with server.http.stream("POST", COMPLETIONS, json=request) as response:
        assert list(sse_events(response.iter_lines()))[-1] == "[DONE]"
    check_error(
        server.http.post(COMPLETIONS, json={**request, "max_tokens": 10**6}), 400, "max_tokens"
    )


def test_a_neighbour_is_not_disturbed_and_nothing_is_kept(server: ServerProcess) -> None:
    long = {"prompt": "circle", "max_tokens": 200, "ignore_eos": True, "temperature": 0}
    alone = server.http.post(COMPLETIONS, json=long).json()["choices"][0]["text"]
    with server.http.stream("POST", COMPLETIONS, json={**long, "stream": True}) as response:
        events = sse_events(response.iter_lines())
        text = json.loads(next(events))["choices"][0]["text"]
        for route, (field, _) in MESSAGES.items():
            for case in IMAGES.values():
                refused = server.http.post(route, json=said(route, image(case), TEXT))
                check_error(refused, 400, f"{field}.0.content.0.image_url")
        text += "".join(json.loads(e)["choices"][0]["text"] for e in events if e != "[DONE]")
    assert text == alone
    wait_until(lambda: server.is_idle, "everything given back")
    assert server.http.get("/health").status_code == 200


def test_nothing_that_was_sent_is_in_the_log(server: ServerProcess) -> None:
    server.http.get(f"/{SECRET}")
    server.http.post(CHAT, json=GOOD[CHAT])
    assert "POST /v1/chat/completions 200" in server.output
    for part in (SECRET, "Traceback", "base64,iVBOR"):
        assert part not in server.output
