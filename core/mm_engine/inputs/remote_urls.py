"""URLs of pictures elsewhere: where they lead, and whether the operator named that place.

A URL is parsed once, by httpx. What is compared, resolved, dialled and sent is made from the parts
that this yields and never from its text, so that no two readings of a text can differ.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urljoin

from mm_engine.errors import StartupError

MAX_URL = 8192  # characters
DEFAULT_PORTS = {"http": 80, "https": 443}
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_MAX_NAME = 253  # characters, as in DNS


class BadURL(ValueError):
    """A text that is no plain http or https URL."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a URL leads."""

    scheme: str  # http or https
    host: str  # a name in lower case and ASCII, without a dot at its end; or an address
    port: int
    path: str  # with the query, percent-encoded

    @property
    def authority(self) -> str:
        """Host and port, as the header Host has them."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def redirected(self, location: str) -> Target:
        """Where a redirect from here leads.

        Raises:
            BadURL: it is no plain http or https URL.
        """
        try:
            joined = urljoin(f"{self.scheme}://{self.authority}{self.path}", location)
        except ValueError:
            raise BadURL from None
        return parse_url(joined)


@dataclass(frozen=True, slots=True)
class AllowedHost:
    """A host that pictures may be fetched from, or all hosts below a domain."""

    host: str
    below: bool = False  # its subdomains instead of itself
    port: int | None = None  # default: that of the URL's scheme

    def admits(self, target: Target) -> bool:
        """Whether a URL that leads there may be fetched."""
        if target.port != (self.port or DEFAULT_PORTS[target.scheme]):
            return False
        if self.below:
            return target.host.endswith(f".{self.host}")
        return target.host == self.host


def parse_url(url: str) -> Target:
    """Where an http or https URL leads.

    Raises:
        BadURL: it is another URL or none, too long, or holds credentials.
    """
    import httpx  # here: it is slow to import, and needed only where URLs are fetched

    if len(url) > MAX_URL:
        raise BadURL
    try:
        parsed = httpx.URL(url)
        host = _normal(parsed.raw_host.decode("ascii"))
        path = parsed.raw_path.decode("ascii")
    except (httpx.InvalidURL, ValueError, IndexError):  # the latter two: of what parses names
        raise BadURL from None
    if parsed.scheme not in DEFAULT_PORTS or parsed.userinfo:
        raise BadURL
    port = DEFAULT_PORTS[parsed.scheme] if parsed.port is None else parsed.port
    if not 0 < port < 2**16:
        raise BadURL
    return Target(parsed.scheme, host, port, path)


def parse_allowed_hosts(texts: Iterable[str]) -> tuple[AllowedHost, ...]:
    """Read the values of `--allowed-media-domains`, each of them one host or several with commas.

    A host is a name or an address, perhaps with a port: `example.com`, `example.com:8443`, `[::1]`.
    `*.example.com` is all hosts below `example.com`, which itself isn't meant.

    Raises:
        StartupError: one can't be read, or names a whole top-level domain.
    """
    entries = [entry.strip() for text in texts for entry in text.split(",")]
    return tuple(_allowed(entry) for entry in entries if entry)


def _allowed(entry: str) -> AllowedHost:
    below = entry.startswith("*.")
    authority = entry.removeprefix("*.")
    has_port = re.search(r":[0-9]+$", authority) is not None
    try:
        target = parse_url(f"http://{authority}")
    except BadURL:
        target = None
    if target is None or target.path != "/" or re.search(r"[\s/?#@\\%*]", authority):
        raise StartupError(
            f"--allowed-media-domains can't be read: {entry}. "
            "Write a host such as example.com, *.example.com or example.com:8443."
        )
    if below and (_is_address(target.host) or "." not in target.host):
        raise StartupError(
            f"--allowed-media-domains names too much: {entry}. Name the domains one by one."
        )
    return AllowedHost(target.host, below, target.port if has_port else None)


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _normal(host: str) -> str:
    """The one spelling of a host that is compared with others.

    Raises:
        BadURL: it is no name in the sense of DNS, and no address.
    """
    if _is_address(host):
        return str(ip_address(host))
    name = host.removesuffix(".")
    if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
        raise BadURL
    return name
