"""Fetching from servers of a test, under names that exist nowhere else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from mm_engine.inputs.fetch import Fetcher, FetchLimits
from mm_engine.inputs.media import ImageSource, MediaLimits
from mm_engine.inputs.remote_urls import parse_allowed_hosts
from origins import Origin


class Names:
    """Resolves every name: the first time to the first addresses, the last go on for ever."""

    def __init__(self, *addresses: list[str]) -> None:
        self._addresses = list(addresses)
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        return self._addresses.pop(0) if len(self._addresses) > 1 else self._addresses[0]


HERE = Names(["127.0.0.1"])


def sources(*urls: str) -> list[ImageSource]:
    """URLs as a request brings them, in fields that are numbered."""
    return [ImageSource(url, str(number)) for number, url in enumerate(urls)]


def fetch(
    origin: Origin,
    *urls: str,
    allowed: str | None = None,
    resolve: Callable[..., Any] | None = HERE,
    may_dial: Callable[[str], bool] | None = lambda address: address.startswith("127."),
    media: MediaLimits | None = None,
    limits: FetchLimits | None = None,
    **options: Any,
) -> list[ImageSource]:
    """Fetch with hosts `pictures.test` and `other.test` at the port of `origin`, on this machine.

    `resolve` and `may_dial` are as in production if they are None.
    """
    if resolve is not None:
        options["resolve"] = resolve
    if may_dial is not None:
        options["may_dial"] = may_dial
    named = allowed or f"pictures.test:{origin.port},other.test:{origin.port}"

    async def run() -> list[ImageSource]:
        fetcher = Fetcher(parse_allowed_hosts([named]), media or MediaLimits(), limits, **options)
        return await fetcher.fetch_all(sources(*urls))

    return asyncio.run(run())
