"""A client leaves: how soon does the server hold nothing for it any more?"""

from __future__ import annotations

import json
import random
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from open_parts.overload import percentiles
from open_parts.server import HELD_FOR_REQUESTS, Server, wait_until
from open_parts.silent import SilentHost
from open_parts.traffic import CHAT, COMPLETIONS, RESPONSES, WORDS, message, picture

MAX_SECONDS = 1.0  # from a client's leaving until nothing is held for it
LIMIT_SECONDS = 30.0
POLL_SECONDS = 0.002
ANSWER_LEN = 3500  # tokens
PROMPT_LEN = 2500  # tokens, of which a step takes 128
NUM_PICTURES = 8  # of which a step encodes one or two
MAX_NUM_SEQS = 2
PROGRAM = (sys.executable, str(Path(__file__).with_name("private_hosts.py")))
FLAGS = (
    *("--dtype", "float32", "--kv-cache-memory", "64MiB", "--max-num-seqs", str(MAX_NUM_SEQS)),
    *("--max-num-batched-tokens", "128", "--log-level", "warning", "--disable-log-stats"),
)
Counts = Mapping[str, float]  # the server's metrics


@dataclass(frozen=True, slots=True)
class Phase:
    """What a request is in when its client leaves."""

    #: Whether it is, by the metrics from before the request and those of now.
    has_begun: Callable[[Counts, Counts], bool]
    #: Whether it had ended, by those of when the client has just left.
    is_over: Callable[[Counts, Counts], bool]
    routes: tuple[str, ...] = (CHAT, COMPLETIONS, RESPONSES)
    num_words: int = 4
    num_pictures: int = 0
    max_tokens: int = ANSWER_LEN
    stream: bool | None = None  # None: by turns
    num_others: int = 0  # that are answered meanwhile, and take all places


def _more(name: str, least: int = 1) -> Callable[[Counts, Counts], bool]:
    """Whether a metric has risen by so much."""
    return lambda before, now: now[name] >= before[name] + least


_IS_READ = _more("prompt_tokens_total")  # once the whole prompt is
_IS_ANSWERED = _more("generation_tokens_total", ANSWER_LEN)
PHASES: dict[str, Phase] = {
    "queued": Phase(_more("num_requests_waiting"), _IS_READ, num_others=MAX_NUM_SEQS),
    "fetching": Phase(
        _more("host_asked"), _more("encodes_total"), routes=(CHAT, RESPONSES), num_pictures=1
    ),
    "encoding": Phase(
        _more("encodes_total"),
        _more("encodes_total", NUM_PICTURES),
        routes=(CHAT, RESPONSES),
        num_pictures=NUM_PICTURES,
        max_tokens=ANSWER_LEN // 2,
    ),
    "prefilling": Phase(
        _more("num_requests_running"), _IS_READ, num_words=PROMPT_LEN, max_tokens=1400
    ),
    "streaming": Phase(_IS_READ, _IS_ANSWERED, stream=True),
    "waiting": Phase(_IS_READ, _IS_ANSWERED, stream=False),
}


def leave(
    names: Sequence[str],
    num_rounds: int,
    flags: tuple[str, ...] = (),
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Leave one server so many times in each of these phases; the figures."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        host = stack.enter_context(SilentHost())
        flags = (*FLAGS, "--allowed-media-domains", host.address, *flags)
        server = stack.enter_context(Server(Path(folder), *flags, program=PROGRAM))
        phases: dict[str, Any] = {}
        for name in names:
            rounds = _Rounds(server, host, name)
            for _ in range(num_rounds):
                rounds.run()
                tick()
            phases[name] = {
                "num_rounds": num_rounds,
                "num_over": rounds.num_over,
                "seconds": percentiles(rounds.seconds),
            }
        tracebacks = server.log.read_text("utf-8", "replace").count("Traceback")
    figures = {"flags": list(flags), "phases": phases, "num_tracebacks": tracebacks}
    criteria = verdict(figures)
    kept = all(criterion["kept"] for criterion in criteria.values())
    return {**figures, "criteria": criteria, "kept": kept}


def verdict(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was held to what, and whether it was kept."""
    judged = {
        name: {
            "criterion": f"nothing is held after {MAX_SECONDS:g} s",
            "found": phase["seconds"]["max"],
            "kept": phase["seconds"]["max"] <= MAX_SECONDS,
        }
        for name, phase in figures["phases"].items()
    }
    found = figures["num_tracebacks"]
    judged["log"] = {"criterion": "no traceback", "found": found, "kept": not found}
    return judged


class _Rounds:
    """Rounds of one phase. Those in which it was over before its client left don't count."""

    def __init__(self, server: Server, host: SilentHost, name: str) -> None:
        self.seconds: list[float] = []
        self.num_over = 0
        self._server = server
        self._host = host
        self._name = name
        self._phase = PHASES[name]
        self._random = random.Random(name)

    def run(self) -> None:
        """One that counts.

        Raises:
            RuntimeError: none does.
        """
        for _ in range(10):
            seconds, over = self._round()
            if not over:
                self.seconds.append(seconds)
                return
            self.num_over += 1
        raise RuntimeError(f"the phase is too short to leave it: {self._name}.")

    def _round(self) -> tuple[float, bool]:
        number, phase = len(self.seconds) + self.num_over, self._phase
        with ExitStack() as others:
            for _ in range(phase.num_others):
                others.enter_context(_asking(self._server, COMPLETIONS, self._other()))
            self._wait(self._others_run, "the others to be answered")
            before = self._counts()
            route = phase.routes[number % len(phase.routes)]
            stream = number % 2 == 0 if phase.stream is None else phase.stream
            with _asking(self._server, route, self._body(route, stream)) as connection:
                if phase.stream:
                    _read_event(connection)
                self._wait(lambda now: phase.has_begun(before, now), f"it to be {self._name}")
            left = time.perf_counter()
            first = self._wait(lambda now: self._is_back(before, now), "all to be given back")
            seconds = time.perf_counter() - left
        wait_until(self._server.is_idle, "it to hold nothing", LIMIT_SECONDS)
        return seconds, phase.is_over(before, first)

    def _others_run(self, now: Counts) -> bool:
        running = now["num_requests_running"] == self._phase.num_others
        return running and not now["num_queued_tokens"]  # their prompts are read

    def _is_back(self, before: Counts, now: Counts) -> bool:
        # Blocks of others grow, and what waits has none.
        names = [
            name for name in HELD_FOR_REQUESTS if name != "num_used_blocks" or not before[name]
        ]
        return all(now[name] <= before[name] for name in names) and not now["host_open"]

    def _counts(self) -> dict[str, float]:
        asked = {"host_asked": self._host.num_asked, "host_open": self._host.num_open}
        return {**self._server.gauges(), **asked}

    def _wait(self, is_so: Callable[[Counts], bool], what: str) -> Counts:
        """Wait until it is so, by the metrics; returns what they were at first.

        Raises:
            RuntimeError: it isn't in time.
        """
        deadline = time.monotonic() + LIMIT_SECONDS
        now = first = self._counts()
        while not is_so(now):
            if time.monotonic() > deadline:
                raise RuntimeError(f"not after {LIMIT_SECONDS:g} s, {self._name}: {what}.")
            time.sleep(POLL_SECONDS)
            now = self._counts()
        return first

    def _text(self, num_words: int) -> str:
        return " ".join(self._random.choices(WORDS, k=num_words))

    def _other(self) -> dict[str, Any]:
        asked = {"prompt": self._text(4), "max_tokens": ANSWER_LEN}
        return {**asked, "ignore_eos": True, "stream": True}

    def _body(self, route: str, stream: bool) -> dict[str, Any]:
        phase = self._phase
        urls = [picture(self._random) for _ in range(phase.num_pictures)]
        if self._name == "fetching":
            urls = [f"http://{self._host.address}/{len(self.seconds)}.png"]
        text, common = self._text(phase.num_words), {"ignore_eos": True, "stream": stream}
        if route == COMPLETIONS:
            return {"prompt": text, "max_tokens": phase.max_tokens, **common}
        if route == CHAT:
            turns = [message(text, urls)]
            return {"messages": turns, "max_tokens": phase.max_tokens, **common}
        parts: list[dict[str, Any]] = [{"type": "input_image", "image_url": url} for url in urls]
        said = {"role": "user", "content": [*parts, {"type": "input_text", "text": text}]}
        return {"input": [said], "max_output_tokens": phase.max_tokens, **common}


@contextmanager
def _asking(server: Server, route: str, body: Mapping[str, Any]) -> Iterator[socket.socket]:
    """A request on a connection of its own, which is closed at the end."""
    url, content = httpx.URL(server.url), json.dumps(body).encode()
    head = f"POST {route} HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: {len(content)}\r\n\r\n"
    address = (url.host, url.port or 80)
    with closing(socket.create_connection(address, timeout=LIMIT_SECONDS)) as connection:
        connection.sendall(head.encode() + content)
        yield connection


def _read_event(connection: socket.socket) -> None:
    """Read until the first event of a stream has come.

    Raises:
        RuntimeError: none does.
    """
    come = b""
    while b"\ndata: " not in come:
        piece = connection.recv(2**16)
        if not piece:
            raise RuntimeError(f"the stream has ended: {come[:500]!r}")
        come += piece
