"""A model behind a running server that speaks OpenAI's API."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from mm_engine.cli.bench.client import base_of, message_of
from mm_engine.cli.chat.messages import Message, Piece
from mm_engine.errors import MMEngineError, RequestError, StartupError
from mm_engine.sampling_params import SamplingParams

CONNECT_SECONDS = 10.0
SILENT_SECONDS = 600.0  # a server that says nothing for so long has failed


class Server:
    """Answers with the model of this name, one request for each answer."""

    def __init__(self, client: httpx.Client, model: str) -> None:
        self.description = f"{model} at {_public(client.base_url)}"
        self.example: Path | None = None
        self._client = client
        self._model = model

    def answer(
        self, messages: Sequence[Message], params: SamplingParams
    ) -> Generator[Piece, None, None]:
        """See `Model.answer`."""
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [_spelled(message) for message in messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": params.seed,
        }
        if params.max_tokens is not None:
            body["max_tokens"] = params.max_tokens
        try:
            with self._client.stream(
                "POST",
                "/v1/chat/completions",
                content=json.dumps(body).encode(),
                headers={"Content-Type": "application/json"},
            ) as response:
                if response.status_code != httpx.codes.OK:
                    text = response.read().decode("utf-8", "replace")
                    raise _refusal(response.status_code, text)
                yield from _pieces(response.iter_lines())
        except httpx.HTTPError as error:
            raise MMEngineError(
                f"the server is gone: {_cause(error)}. Ask again when it runs: /retry."
            ) from None


@contextlib.contextmanager
def connected(url: str, api_key: str | None, model: str | None) -> Iterator[Server]:
    """The server at `url` (with `/v1` or without); no model named: the first that it names.

    Raises:
        StartupError: it can't be reached, refuses the key, or names no model.
    """
    if api_key and not (api_key.isascii() and api_key.isprintable()):
        raise StartupError(
            "the API key can't be sent: it holds characters that no HTTP header may. "
            "Check MM_ENGINE_API_KEY."
        )
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        base = httpx.URL(base_of(url if "://" in url else f"http://{url}"))
        local = base.host in ("127.0.0.1", "::1", "localhost")
        client = httpx.Client(
            base_url=base,
            headers=headers,
            timeout=httpx.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS),
            trust_env=not local,  # the environment's proxies know no server of this machine
        )
    except (httpx.InvalidURL, ValueError):
        raise StartupError(
            "--url is no address. Write it as http://127.0.0.1:8000, with /v1 or without."
        ) from None
    with client:
        yield Server(client, model or _first_model(client))


def _first_model(client: httpx.Client) -> str:
    address = _public(client.base_url)
    try:
        response = client.get("/v1/models")
    except httpx.HTTPError as error:
        raise StartupError(
            f"no server answers: {address} ({_cause(error)}). Start one with `engine serve`, "
            "or leave --url out: `engine chat` loads a model itself."
        ) from None
    if response.status_code == httpx.codes.UNAUTHORIZED:
        raise StartupError(str(_refusal(response.status_code, response.text)))
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise StartupError(
            f"the server names no model: {address}/v1/models answers {response.status_code}. "
            "Check --url, or give --model."
        ) from None


def _pieces(lines: Iterable[str]) -> Iterator[Piece]:
    """What the events of a stream tell.

    Raises:
        MMEngineError: it tells of an error, isn't understood, or ends before the answer does.
    """
    for line in lines:
        data = line[5:].strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            return
        if not data:
            continue
        try:
            event = json.loads(data)
            if "error" in event:
                raise _refusal(None, data)
            choice = (event.get("choices") or [{}])[0]
            usage = event.get("usage") or {}
            piece = Piece(
                str((choice.get("delta") or {}).get("content") or ""),
                usage.get("completion_tokens"),
                usage.get("prompt_tokens"),
                choice.get("finish_reason"),
            )
        except (ValueError, LookupError, TypeError, AttributeError):
            raise MMEngineError(
                "the server's answer can't be read: an event isn't in OpenAI's form. Check --url."
            ) from None
        yield piece
    raise MMEngineError(
        "the answer was cut off: its stream has no end. Ask again with /retry, or look at the "
        "server's log."
    )


def _refusal(status: int | None, body: str) -> RequestError:
    """An error in words, from a response or (without a status) from a stream."""
    code = None
    with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
        code = json.loads(body)["error"].get("code")
    said = message_of(body)
    if status == httpx.codes.UNAUTHORIZED:
        return RequestError(
            f"the server wants another key: {said} Set MM_ENGINE_API_KEY, or give --api-key."
        )
    number = "" if status is None else f" {status}"
    return RequestError(f"the server answers{number}: {said}", code=code)


def _cause(error: httpx.HTTPError) -> str:
    """What happened, without the address or anything that was sent."""
    told = "" if isinstance(error, httpx.LocalProtocolError) else " ".join(str(error).split())
    return f"{type(error).__name__}{f', {told}' if told else ''}".rstrip(".")


def _public(url: httpx.URL) -> str:
    """An address without a name and a password in it."""
    return str(url.copy_with(userinfo=b"")).rstrip("/")


def _spelled(message: Message) -> dict[str, Any]:
    pictures = []
    for picture in message.pictures:
        url = f"data:{picture.mime};base64,{base64.b64encode(picture.encoded).decode()}"
        pictures.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": message.role, "content": message.content(pictures)}
