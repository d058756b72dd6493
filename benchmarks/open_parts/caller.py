"""Sends one request of the traffic, leaves where its client leaves, and judges what comes."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import httpx

from open_parts.traffic import Asked

ANSWER_SECONDS = 120.0  # a request that isn't answered by then hangs
_ENDINGS = ("data: [DONE]", "event: response.completed", "event: response.incomplete")


@dataclass(frozen=True, slots=True)
class Came:
    """What came back. `complaint` says what shouldn't have; "" if nothing."""

    status: int | None  # None: the client left before, or nothing came
    complaint: str = ""
    body: bytes = b""  # whole answers only


def open_client(url: str) -> httpx.AsyncClient:
    """A client without a limit on connections."""
    return httpx.AsyncClient(
        base_url=url,
        timeout=httpx.Timeout(ANSWER_SECONDS),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=False,
    )


async def call(client: httpx.AsyncClient, asked: Asked) -> Came:
    """Send it. Never raises for what the server does."""
    try:
        if asked.leaves == "in its body":
            await _leave_in_body(client.base_url, asked)
            return Came(None)
        if asked.leaves == "after a time":
            try:
                async with asyncio.timeout(asked.leaves_after):
                    return await _ask(client, asked)
            except TimeoutError:
                return Came(None)
        return await _ask(client, asked)
    except httpx.TimeoutException:
        return Came(None, f"nothing came for {ANSWER_SECONDS:g} s")
    except (httpx.HTTPError, OSError) as error:
        return Came(None, f"the connection failed: {type(error).__name__}")


async def _ask(client: httpx.AsyncClient, asked: Asked) -> Came:
    headers = {"Content-Type": "application/json"}
    async with client.stream(
        asked.method, asked.path, content=asked.body, headers=headers
    ) as response:
        if response.status_code != httpx.codes.OK or not asked.stream:
            body = await response.aread()
            return Came(response.status_code, _judge(asked, response.status_code, body), body)
        num_events, ended = 0, False
        async for line in response.aiter_lines():
            ended = ended or line.startswith(_ENDINGS)
            if line.startswith(('data: {"error"', "event: error", "event: response.failed")):
                return Came(200, f"the stream broke off: {line[:200]}")
            num_events += line.startswith("data:")
            if asked.leaves == "after some events" and num_events >= asked.leaves_after:
                return Came(None)
        return Came(200, "" if ended else "the stream was cut off before its end")


def _judge(asked: Asked, status: int, body: bytes) -> str:
    try:
        told = json.loads(body)
    except ValueError:
        return f"{status} with a body that is no JSON"
    if not asked.bad:
        return "" if status == httpx.codes.OK else f"{status}: {told}"
    if not 400 <= status < 500:
        return f"bad input was answered with {status}"
    error = told.get("error") if isinstance(told, dict) else None
    good = isinstance(error, dict) and error.keys() == {"message", "type", "param", "code"}
    return "" if good and error["message"] else f"{status} without OpenAI's error body"


async def _leave_in_body(url: httpx.URL, asked: Asked) -> None:
    """Send the head and a part of the body, and hang up."""
    _, writer = await asyncio.open_connection(url.host, url.port)
    try:
        head = (
            f"{asked.method} {asked.path} HTTP/1.1\r\nHost: {url.host}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(asked.body)}\r\n\r\n"
        )
        writer.write(head.encode() + asked.body[: int(len(asked.body) * asked.leaves_after)])
        await writer.drain()
    finally:
        writer.close()


def answer_of(path: str, body: bytes) -> Any:
    """What must be the same whenever the same is asked: no ids, no times, no caches' counts."""
    told = json.loads(body)
    if "choices" in told:
        return [
            choice["text"] if "text" in choice else choice["message"] for choice in told["choices"]
        ]
    if "output" in told:
        return [part["text"] for item in told["output"] for part in item["content"]]
    return told["tokens"]
