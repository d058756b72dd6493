"""API keys: who may come in, and how much each may have."""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import time
from collections.abc import Callable, Collection
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from mm_engine.errors import Overloaded, StartupError
from mm_engine.server.errors import error_body, respond

OPEN_PATHS = frozenset({"/health", "/ready"})  # what asks them has no key
MAX_KEYS = 10_000
_COMMENT = re.compile(r"(?:^|\s)#.*")

#: The SHA-256 of the key that a request came with; None where none is asked for.
current_key: ContextVar[bytes | None] = ContextVar("current_key", default=None)


def read_keys(given: Collection[str], file: Path | None) -> tuple[str, ...]:
    """The keys from flag or environment and those of a file: one a line.

    In a file a line's `#`, or one behind a space, begins a comment.

    Raises:
        StartupError: the file can't be read or has none, or a key holds other characters than
            HTTP takes.
    """
    keys = list(given)
    if file is not None:
        try:
            lines = file.read_text("ascii").splitlines()
        except (OSError, ValueError) as error:
            cause = getattr(error, "strerror", None) or "it isn't ASCII"
            raise StartupError(
                f"the API keys can't be read: {file} ({cause}). Check --api-key-file."
            ) from None
        found = [key for line in lines if (key := _COMMENT.sub("", line).strip())]
        if not found:
            raise StartupError(f"there is no API key in {file}. Write one a line.")
        keys += found
    if not all(key and key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise StartupError(
            "an API key is empty or holds other characters than HTTP takes. "
            "Use letters, digits and punctuation."
        )
    if len(keys) > MAX_KEYS:
        raise StartupError(f"there are too many API keys: {len(keys)}. At most {MAX_KEYS}.")
    return tuple(dict.fromkeys(keys))


class ApiKey:
    """Answers 401 to whoever doesn't send `Authorization: Bearer <key>`; probes need none.

    The comparison takes the same time wherever keys differ, however long they are and whichever of
    them it is: their digests are compared, each with all.
    """

    def __init__(self, app: ASGIApp, keys: Collection[str]) -> None:
        self.app = app
        self._digests = [
            hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest() for key in keys
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what carries a key."""
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        digest = self._known(scope)
        if digest is not None:
            current_key.set(digest)
            await self.app(scope, receive, send)
            return
        scope.setdefault("mm_engine.notes", {})["rejected"] = "api_key"
        body = error_body(
            "the API key is missing or wrong. Send it as Authorization: Bearer <key>.",
            "authentication_error",
            code="invalid_api_key",
        )
        await respond(401, body, {"WWW-Authenticate": "Bearer"})(scope, receive, send)

    def _known(self, scope: Scope) -> bytes | None:
        given = b""
        for name, value in scope["headers"]:
            if name == b"authorization":
                given = value
        scheme, _, key = given.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        known = False
        for other in self._digests:
            known |= hmac.compare_digest(digest, other)
        return digest if known and scheme.lower() == b"bearer" else None


@dataclass(slots=True)
class _Account:
    """What one key has, and may begin: `tokens` of a bucket, as of `filled`."""

    num_running: int = 0
    tokens: float = 0.0
    filled: float = 0.0


class KeyLimits:
    """How many requests each key may have at once, and begin in a minute; None is no limit.

    The rate is a token bucket: as many as a minute's may come at once, then they come evenly.
    Without keys all clients share one account.
    """

    def __init__(
        self,
        max_running: int | None,
        max_per_minute: int | None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_running = max_running
        self._max_per_minute = max_per_minute
        self._now = now
        self._accounts: dict[bytes | None, _Account] = {}

    def begin(self, key: bytes | None) -> None:
        """Let a request begin; `end` has to follow.

        Raises:
            Overloaded: its key has as many as it may have.
        """
        account = self._accounts.get(key)
        if account is None:
            account = _Account(tokens=float(self._max_per_minute or 0), filled=self._now())
            self._accounts[key] = account
        if self._max_running is not None and account.num_running >= self._max_running:
            raise Overloaded(
                f"too many requests at once: {self._max_running} are answered for each key. "
                "Send the request again when one has ended.",
                reason="key_limit",
            )
        if self._max_per_minute is not None:
            self._take(account, self._max_per_minute)
        account.num_running += 1

    def end(self, key: bytes | None) -> None:
        """A request that began has ended."""
        self._accounts[key].num_running -= 1

    def _take(self, account: _Account, rate: int) -> None:
        now = self._now()
        gained = (now - account.filled) * rate / 60
        account.tokens, account.filled = min(float(rate), account.tokens + gained), now
        if account.tokens < 1:
            seconds = (1 - account.tokens) * 60 / rate
            raise Overloaded(
                f"too many requests in a minute: {rate} are taken for each key. "
                "Send the request again later.",
                retry_after=math.ceil(seconds),
                reason="key_limit",
            )
        account.tokens -= 1
