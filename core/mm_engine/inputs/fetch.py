"""Pictures from other hosts, for http and https URLs; off until the operator names hosts.

A URL is checked, its host resolved once, every address that comes back judged, and then the first
of them dialled, the next if it doesn't answer: the connection is made to the address itself, so
nobody resolves the name again. TLS still checks the certificate against the name. Where a redirect
leads is checked in the same way. All of it, the name's resolution included, has one limit of time.

A host with one address that isn't public is refused even if it has others: which of them gets
dialled would be up to whoever answers for the name.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from mm_engine.errors import Overloaded, RequestError, StartupError
from mm_engine.inputs.addresses import is_public
from mm_engine.inputs.host_names import Resolve, resolve
from mm_engine.inputs.media import ByteBudget, ImageSource, MediaLimits, scheme_of, too_long
from mm_engine.inputs.remote_urls import AllowedHost, BadURL, Target, parse_url

if TYPE_CHECKING:
    import httpx

Outcome = Literal[
    "ok", "url", "host", "address", "name", "connection", "redirect", "status", "encoding",
    "size", "timeout", "busy", "cancelled", "error",
]  # fmt: skip
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)

MAX_ADDRESSES = 3  # of a host that are tried
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_INSTEAD = "or send the image as a data URL: data:image/png;base64,…"
#: What the caller is told. Never which URL, name or address: they may hold secrets, or tell some.
_SENTENCES: dict[Outcome, str] = {
    "url": "the image's URL is malformed, too long, or holds a user's name. "
    f"Correct it, {_INSTEAD}",
    "host": "the image's URL leads to a host or port that this server doesn't fetch from "
    f"(--allowed-media-domains). Use one that it does, {_INSTEAD}",
    "address": f"the image's host has an address that isn't public. Use another host, {_INSTEAD}",
    "name": f"the image's host has no address. Correct its name, {_INSTEAD}",
    "connection": "the image's host can't be reached, has no valid certificate, or broke off. "
    f"Try again, {_INSTEAD}",
    "redirect": "the image's URL redirects too often, or to where this server doesn't fetch from. "
    f"Use the URL where the image is, {_INSTEAD}",
    "status": "the image's host answered with a status other than 200. "
    f"Correct the URL, {_INSTEAD}",
    "encoding": f"the image's host sent it compressed. Use another host, {_INSTEAD}",
    "timeout": f"the image took too long to arrive. Use a faster host, {_INSTEAD}",
}


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """What fetching one image may take. Times are in seconds."""

    connect_timeout: float = 5.0  # for the host's name, then for TCP, then for TLS
    timeout: float = 15.0  # in all
    max_redirects: int = 5
    max_fetches: int = 16  # at the same time, of all requests


class _Failed(Exception):
    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome: Outcome = outcome


def authorities() -> ssl.SSLContext:
    """Whose certificates are believed: those that httpx comes with, or those of SSL_CERT_FILE.

    Raises:
        StartupError: they can't be read.
    """
    import httpx  # here: it is slow to import, and needed only where images are fetched

    try:
        return httpx.create_ssl_context()
    except OSError as error:  # ssl's own among them
        raise StartupError(
            f"authorities for https can't be read: {error.strerror or type(error).__name__}. "
            "Correct SSL_CERT_FILE and SSL_CERT_DIR, or unset them."
        ) from error


class Fetcher:
    """Fetches pictures from the hosts that are allowed. For one event loop.

    `on_end` is told how each fetch ended, and after how many seconds (None: it never began).
    `resolve` finds a host's addresses, `may_dial` says which of them are taken.
    """

    def __init__(
        self,
        allowed: Sequence[AllowedHost],
        media: MediaLimits,
        limits: FetchLimits | None = None,
        *,
        on_end: Callable[[Outcome, float | None], None] = lambda outcome, seconds: None,
        resolve: Resolve = resolve,
        may_dial: Callable[[str], bool] = is_public,
    ) -> None:
        self._allowed = tuple(allowed)
        self._media = media
        self._limits = limits or FetchLimits()
        self._on_end = on_end
        self._resolve = resolve
        self._may_dial = may_dial
        self._tls: ssl.SSLContext | None = None
        self._free = asyncio.Semaphore(self._limits.max_fetches)

    async def fetch_all(self, sources: Sequence[ImageSource]) -> list[ImageSource]:
        """The same sources, with what their http and https URLs led to; all at the same time.

        If one fails the others are given up.

        Raises:
            RequestError: a URL isn't taken here, or doesn't lead to so many bytes as may come.
            Overloaded: so many images are being fetched that this one had to wait too long.
        """
        if not any(_is_remote(source) for source in sources):
            return list(sources)
        budget = ByteBudget(self._media)
        for source in sources:
            if not _is_remote(source):
                budget.take(len(source.url) * 3 // 4, source.param)  # of base64; a path is nothing
        await self._prepare()
        targets = [self._target(source) if _is_remote(source) else None for source in sources]
        fetches = [
            asyncio.create_task(self._fetched(source, target, budget))
            for source, target in zip(sources, targets, strict=True)
        ]
        try:
            return await asyncio.gather(*fetches)
        finally:
            for fetch in fetches:
                fetch.cancel()
            await asyncio.gather(*fetches, return_exceptions=True)

    async def _prepare(self) -> None:
        """What takes long the first time, and is in nobody's way in a thread."""

        if self._tls is None:
            self._tls = await asyncio.to_thread(authorities)

    def _target(self, source: ImageSource) -> Target:
        """Where the URL leads; refused before any of the request's images is fetched."""
        try:
            return self._checked(lambda: parse_url(source.url))
        except _Failed as failed:
            self._on_end(failed.outcome, None)
            raise RequestError(_SENTENCES[failed.outcome], param=source.param) from None

    def _checked(self, parse: Callable[[], Target]) -> Target:
        try:
            target = parse()
        except BadURL:
            raise _Failed("url") from None
        if not any(allowed.admits(target) for allowed in self._allowed):
            raise _Failed("host")
        return target

    async def _fetched(
        self, source: ImageSource, target: Target | None, budget: ByteBudget
    ) -> ImageSource:
        if target is None:
            return source
        outcome: Outcome = "error"
        began: float | None = None
        try:
            async with self._turn():
                began = time.perf_counter()
                async with asyncio.timeout(self._limits.timeout):
                    encoded = await self._follow(target, source.param, budget)
            outcome = "ok"
            return dataclasses.replace(source, fetched=encoded)
        except (_Failed, TimeoutError) as failed:
            outcome = failed.outcome if isinstance(failed, _Failed) else "timeout"
            raise RequestError(_SENTENCES[outcome], param=source.param) from None
        except RequestError:
            outcome = "size"
            raise
        except Overloaded:
            outcome = "busy"
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            self._on_end(outcome, None if began is None else time.perf_counter() - began)

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Wait until few enough images are being fetched; no longer than a fetch may take."""
        try:
            async with asyncio.timeout(self._limits.timeout):
                await self._free.acquire()
        except TimeoutError:
            raise Overloaded(
                f"too many images are being fetched: {self._limits.max_fetches}. "
                "Send the request again later.",
                reason="media_full",
            ) from None
        try:
            yield
        finally:
            self._free.release()

    async def _follow(self, target: Target, param: str, budget: ByteBudget) -> bytes:
        for _ in range(self._limits.max_redirects + 1):
            async with self._get(target, await self._addresses(target)) as response:
                location = response.headers.get("location")
                if response.status_code not in _REDIRECTS or location is None:
                    return await self._body(response, param, budget)
            target = self._redirected(target, location)
        raise _Failed("redirect")

    def _redirected(self, target: Target, location: str) -> Target:
        try:
            leads = self._checked(lambda: target.redirected(location))
        except _Failed:
            raise _Failed("redirect") from None
        if (target.scheme, leads.scheme) == ("https", "http"):
            raise _Failed("redirect")
        return leads

    async def _addresses(self, target: Target) -> list[str]:
        """The addresses of this host that may be dialled: all of them, or none."""
        try:
            async with asyncio.timeout(self._limits.connect_timeout):
                addresses = await self._resolve(target.host, target.port)
        except TimeoutError:
            raise
        except (OSError, ValueError):
            raise _Failed("name") from None
        if not addresses:
            raise _Failed("name")
        if not all(map(self._may_dial, addresses)):
            raise _Failed("address")
        return list(dict.fromkeys(addresses))[:MAX_ADDRESSES]

    @contextlib.asynccontextmanager
    async def _get(self, target: Target, addresses: list[str]) -> AsyncIterator[httpx.Response]:
        """The response to one GET. A transport keeps no cookies, follows no redirect, decodes
        nothing and writes no URL to the log; a new one shares no connection with other hosts."""
        import httpx

        assert self._tls is not None
        try:
            async with httpx.AsyncHTTPTransport(verify=self._tls, trust_env=False) as transport:
                response = await self._answer(transport, target, addresses)
                async with contextlib.aclosing(response):
                    yield response
        except httpx.TimeoutException:
            raise _Failed("timeout") from None
        except httpx.TransportError:
            raise _Failed("connection") from None

    async def _answer(
        self, transport: httpx.AsyncHTTPTransport, target: Target, addresses: list[str]
    ) -> httpx.Response:
        """The response of the first of these addresses that a connection can be made to."""
        import httpx

        for address in addresses[:-1]:
            with contextlib.suppress(httpx.ConnectError, httpx.ConnectTimeout):
                return await transport.handle_async_request(self._request(target, address))
        return await transport.handle_async_request(self._request(target, addresses[-1]))

    def _request(self, target: Target, address: str) -> httpx.Request:
        import httpx

        limits = self._limits
        timeouts = dict.fromkeys(("read", "write", "pool"), limits.timeout)
        path = target.path.encode("ascii")
        return httpx.Request(
            "GET",
            httpx.URL(scheme=target.scheme, host=address, port=target.port, raw_path=path),
            headers={
                "Host": target.authority,
                "User-Agent": "mm-engine",
                "Accept": "image/png, image/jpeg, image/webp, image/gif",
                "Accept-Encoding": "identity",
                "Connection": "close",
            },
            extensions={
                "timeout": {"connect": limits.connect_timeout, **timeouts},
                "sni_hostname": target.host,
            },
        )

    async def _body(self, response: httpx.Response, param: str, budget: ByteBudget) -> bytes:
        if response.status_code != 200:
            raise _Failed("status")
        if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise _Failed("encoding")
        announced = response.headers.get("content-length", "")  # h11 takes numbers only
        if int(announced or 0) > self._media.max_bytes:
            raise too_long(self._media, param)
        body = bytearray()
        async for chunk in response.aiter_raw():
            if len(body) + len(chunk) > self._media.max_bytes:
                raise too_long(self._media, param)
            budget.take(len(chunk), param)
            body += chunk
        return bytes(body)


def _is_remote(source: ImageSource) -> bool:
    return scheme_of(source.url) in ("http", "https")
