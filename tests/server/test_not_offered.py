"""OpenAI's routes that aren't offered: a 404 that says so, whatever is asked of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from mm_engine.server.not_offered import NOT_OFFERED
from serving import ServerProcess, wait_until


def check(response: httpx.Response) -> None:
    assert response.status_code == 404
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("invalid_request_error", "not_offered")
    assert error["message"].startswith("not offered by this server: ")
    assert error["message"].count(". ") == 1 and error["message"].endswith(".")


@pytest.mark.parametrize("path", NOT_OFFERED)
def test_each_says_so_and_what_there_is_instead(server: ServerProcess, path: str) -> None:
    check(server.http.post(path, json={"input": "x"}))
    for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS", "INVENTED"):
        check(server.http.request(method, path))
        check(server.http.request(method, f"{path}/s3cr3t/more"))
    for line in (f"POST {path} 404", f"INVENTED {path}/{{rest}} 404"):
        wait_until(lambda line=line: line in server.output, "its line in the log")  # type: ignore[misc]
    assert "s3cr3t" not in server.output


def test_others_are_unknown(server: ServerProcess) -> None:
    for path in ("/v1/embedding", "/v1/embeddingsx", "/v1/nothing"):
        error = server.http.post(path).json()["error"]
        assert error["code"] is None
        assert error["message"].startswith("no such route")


CALLS: dict[str, Callable[[OpenAI], Any]] = {
    "embeddings": lambda client: client.embeddings.create(model="demo", input="x"),
    "speech": lambda client: client.audio.speech.create(model="demo", input="x", voice="alloy"),
    "transcription": lambda client: client.audio.transcriptions.create(model="demo", file=b"x"),
    "images": lambda client: client.images.generate(model="demo", prompt="x"),
    "moderations": lambda client: client.moderations.create(input="x"),
    "upload": lambda client: client.files.create(file=b"x", purpose="batch"),
    "files": lambda client: client.files.list(),
    "batches": lambda client: client.batches.retrieve("batch_1"),
    "fine-tuning": lambda client: client.fine_tuning.jobs.list(),
    "counting": lambda client: client.responses.input_tokens.count(model="demo", input="x"),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_client_raises_not_found(client: OpenAI, call: str) -> None:
    with pytest.raises(openai.NotFoundError, match="not offered by this server") as raised:
        CALLS[call](client)
    assert raised.value.code == "not_offered"
