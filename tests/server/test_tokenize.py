"""`/tokenize` and `/detokenize`: the ids that a prompt or a conversation has, and back."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import OpenAI
from transformers import AutoTokenizer

from mm_engine.plugins.discovery import demos
from pictures import data_url, encode, quarters
from serving import KEY, ServerProcess, wait_until

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(min(demos().items())[1])


def tokens_of(server: ServerProcess, **body: Any) -> dict[str, Any]:
    response = server.http.post("/tokenize", json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def text_of(server: ServerProcess, tokens: list[int]) -> str:
    response = server.http.post("/detokenize", json={"tokens": tokens})
    assert response.status_code == 200, response.text
    assert set(response.json()) == {"prompt"}
    return str(response.json()["prompt"])


@pytest.mark.parametrize("text", ["circle", "", "naïve 你好 🙂", "a </s> b <image>", "\0 \u2028"])
@pytest.mark.parametrize("special", [None, True, False])
def test_a_prompts_ids_are_the_tokenizers(
    server: ServerProcess, tokenizer: Any, text: str, special: bool | None
) -> None:
    answer = tokens_of(server, model="demo", prompt=text, add_special_tokens=special)
    expected = tokenizer(text, add_special_tokens=special is not False)["input_ids"]
    assert answer == {
        "count": len(expected),
        "max_model_len": 4096,
        "tokens": expected,
        "token_strs": None,
    }
    strings = tokens_of(server, prompt=text, add_special_tokens=special, return_token_strs=True)
    assert strings["token_strs"] == tokenizer.convert_ids_to_tokens(expected)


def test_a_prompts_count_is_what_a_completion_counts(server: ServerProcess, client: OpenAI) -> None:
    usage = client.completions.create(model="demo", prompt="a red circle", max_tokens=1).usage
    assert usage
    assert tokens_of(server, prompt="a red circle")["count"] == usage.prompt_tokens


@pytest.mark.parametrize("num_images", [0, 1, 3])
@pytest.mark.parametrize("generation_prompt", [None, False])
def test_a_conversations_count_is_what_a_chat_counts(
    server: ServerProcess, num_images: int, generation_prompt: bool | None
) -> None:
    images = [data_url(encode(quarters(40 + 8 * i, 24))) for i in range(num_images)]
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}} for url in images
    ]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [*parts, {"type": "text", "text": "What <image> is it?"}]},
    ]
    body: dict[str, Any] = {"messages": messages, "add_generation_prompt": generation_prompt}
    answer = tokens_of(server, **body)
    usage = server.http.post(CHAT, json={**body, "max_tokens": 1}).json()["usage"]
    assert answer["count"] == len(answer["tokens"]) == usage["prompt_tokens"]
    if num_images:
        without = tokens_of(server, messages=[messages[0], {"role": "user", "content": "What"}])
        assert answer["count"] > without["count"] + 15 * num_images


def test_ids_become_the_text_again(server: ServerProcess, tokenizer: Any) -> None:
    for text in ("a red circle", "naïve 你好 🙂", "x </s> y"):
        tokens = tokens_of(server, prompt=text)["tokens"]
        assert text_of(server, tokens) == tokenizer.decode(tokens)
    assert "red circle" in text_of(server, tokens_of(server, prompt="a red circle")["tokens"])
    assert text_of(server, []) == ""


def test_an_expanded_conversation_is_detokenized_too(server: ServerProcess) -> None:
    picture = {"type": "image_url", "image_url": {"url": data_url(encode(quarters(40, 24)))}}
    text = {"type": "text", "text": "What is it?"}
    messages = [{"role": "user", "content": [picture, text]}]
    tokens = tokens_of(server, messages=messages)["tokens"]
    assert "What is it?" in text_of(server, tokens)


def test_the_last_id_is_taken_and_one_behind_it_is_refused(
    server: ServerProcess, tokenizer: Any
) -> None:
    last = len(tokenizer) - 1
    assert text_of(server, [last]) == tokenizer.decode([last])
    response = server.http.post("/detokenize", json={"tokens": [1, 10**5]})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "tokens"
    assert "out of range: 100000" in error["message"]


def test_the_longest_text_is_tokenized_while_health_answers(server: ServerProcess) -> None:
    text = "a red circle " * (2**20 // 13)
    with ThreadPoolExecutor() as pool:
        call = pool.submit(tokens_of, server, prompt=text)
        while not call.done():
            assert server.http.get("/health").elapsed.total_seconds() < 10
    tokens = call.result()["tokens"]
    assert len(tokens) > 4096
    for longer in (text + "x" * 30, "é" * (2**19 + 1)):  # it's bytes that count
        refused = server.http.post("/tokenize", json={"prompt": longer})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
    wait_until(lambda: server.is_idle, "everything given back")


def test_a_full_queue_refuses_them(strict: ServerProcess) -> None:
    wait_until(lambda: strict.is_idle, "the last test's prompts to leave")
    bodies = {"/tokenize": {"prompt": "x"}, "/detokenize": {"tokens": [1]}}
    for path, body in bodies.items():
        assert strict.http.post(path, json=body).status_code == 200
    request: dict[str, Any] = {"model": "first", "prompt": "circle", "max_tokens": 3000}
    with strict.client(KEY) as client, ThreadPoolExecutor() as pool:
        running = client.completions.create(**request, stream=True, extra_body={"ignore_eos": True})
        next(iter(running))
        for path, body in bodies.items():  # there is a place left
            assert strict.http.post(path, json=body).status_code == 200
        waiting = pool.submit(lambda: client.completions.create(model="first", prompt="x"))
        wait_until(lambda: strict.metric("mm_engine_num_requests_in_flight") == 2, "two in flight")
        for path, body in bodies.items():
            refused = strict.http.post(path, json=body)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
        running.close()
        assert waiting.result().choices
    assert strict.http.post("/tokenize", json={"prompt": "x"}).status_code == 200
