"""A load on a server over HTTP: who is asked, what is tried first, what is measured."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import httpx

from mm_engine.cli.bench.arrivals import arrival_times, drive
from mm_engine.cli.bench.bodies import Bodies
from mm_engine.cli.bench.client import Measured, ask, base_of, message_of, open_client
from mm_engine.cli.bench.load_flags import LoadFlags
from mm_engine.cli.bench.workload import Shape, WordPool, Workload
from mm_engine.errors import MMEngineError, StartupError

WARM_UP = 1  # the stream of prompts that aren't measured
TRIAL_TOKENS = 8
MAX_MERGED = 2  # tokens that a text may lose where it meets a template's words
SPARE_FILES = 128  # open at the same time as the connections


@dataclass(frozen=True, slots=True)
class Target:
    """Who is asked."""

    url: str  # of the server, with or without /v1
    model: str | None  # None: the first that the server names
    tokenizer: str | None  # a checkpoint whose tokenizer counts the prompts; None: the model's
    api_key: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class LoadRun:
    """All requests of a load, failed ones too, in their order."""

    model: str  # as the requests named it
    begin: float  # `time.perf_counter()`, as the requests' times
    seconds: float  # to the last request's end
    requests: list[Measured]

    @property
    def answered(self) -> list[Measured]:
        """The requests that were answered in full."""
        return [request for request in self.requests if request.failure is None]

    def in_flight(self) -> list[tuple[float, int]]:
        """How many requests are in flight from which second on."""
        steps = [(request.begin - self.begin, 1) for request in self.requests]
        steps += [(request.end - self.begin, -1) for request in self.requests]
        flight, count = [(0.0, 0)], 0
        for second, step in sorted(steps):
            count += step
            flight.append((second, count))
        return flight


async def measure_load(
    target: Target,
    load: LoadFlags,
    shape: Shape,
    tick: Callable[[], None],
    status: Callable[[str], None],
) -> LoadRun:
    """Try a request, warm up, then send the load; `tick` is called as each request ends.

    Raises:
        StartupError: the server can't be reached, or the model's tokenizer isn't to be had.
        MMEngineError: it doesn't answer the request that is tried first.
    """
    import numpy as np

    url = base_of(target.url)
    async with open_client(url, target.api_key) as client:
        status("Asking the server")
        model = target.model or await first_model(client, url)
        pool = read_pool(target.tokenizer or model)
        warm_up = Bodies(Workload(shape, pool, stream=WARM_UP), model, load.endpoint)
        warm_up.num_extra_tokens = await _num_extra_tokens(client, warm_up)
        for index in range(load.num_warmups):
            _check(await ask(client, load.endpoint, warm_up.body(index)))
        status("Preparing the requests")
        bodies = Bodies(Workload(shape, pool), model, load.endpoint, warm_up.num_extra_tokens)
        prepared = []
        for index in range(load.num_prompts):
            prepared.append(bodies.body(index))
            await asyncio.sleep(0)  # pictures take long: Ctrl-C comes through here
        rng = np.random.default_rng(shape.seed)
        arrivals = arrival_times(load.num_prompts, load.request_rate, load.burstiness, rng)
        requests: list[Measured] = []

        async def send(index: int) -> None:
            requests.append(await ask(client, load.endpoint, prepared[index], index))
            tick()

        status("Measuring")
        begin = time.perf_counter()
        await drive(arrivals, send, load.max_concurrency)
        seconds = time.perf_counter() - begin
    requests.sort(key=lambda request: request.index)
    return LoadRun(model, begin, seconds, requests)


async def first_model(client: httpx.AsyncClient, url: str) -> str:
    """The first model that the server names.

    Raises:
        StartupError: it can't be reached, or names none.
    """
    try:
        response = await client.get("/v1/models")
    except httpx.HTTPError as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise StartupError(
            f"no server answers: {url} ({cause}). Start one with `engine serve`, "
            "or leave --base-url out."
        ) from None
    if response.status_code == httpx.codes.UNAUTHORIZED:
        raise StartupError(
            f"the server wants a key: {url} ({message_of(response.text)}) "
            "Set MM_ENGINE_API_KEY, or give --api-key."
        )
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise StartupError(
            f"the server names no model: {url}/v1/models answers {response.status_code}. "
            "Give --model."
        ) from None


def read_pool(tokenizer: str) -> WordPool:
    """The words of a checkpoint's tokenizer.

    Raises:
        StartupError: it isn't to be had, or has no words.
    """
    from mm_engine.models import checkpoint
    from mm_engine.plugins.discovery import demos

    try:
        path = demos().get(tokenizer) or checkpoint.locate(tokenizer)
        return WordPool(checkpoint.read_tokenizer(path))
    except (StartupError, ValueError) as error:
        raise StartupError(
            f"the prompts' tokens can't be counted: no tokenizer for {tokenizer} ({error}) "
            "Give --tokenizer a checkpoint's folder or a Hub id."
        ) from None


async def _num_extra_tokens(client: httpx.AsyncClient, bodies: Bodies) -> int:
    """Tokens that the server counts beyond those of the text: its template's, mostly.

    Raises:
        MMEngineError: it counts fewer than were sent.
    """
    answer = await ask(client, bodies.endpoint, bodies.trial(TRIAL_TOKENS))
    _check(answer)
    if answer.prompt_tokens is None:  # it doesn't tell: the text is all that is known
        return 0
    sent = bodies.workload.shape.prefix_len + TRIAL_TOKENS
    if answer.prompt_tokens < sent - MAX_MERGED:
        raise MMEngineError(
            f"the server counts fewer tokens than were sent: {answer.prompt_tokens} of {sent}. "
            "Give --tokenizer the model's own; --prefix-len wants a chat template that writes "
            "system messages."
        )
    return answer.prompt_tokens - sent


def _check(answer: Measured) -> None:
    if answer.failure is not None:
        kind, message = answer.failure.kind, answer.failure.message
        raise MMEngineError(f"the server doesn't answer a first request: {kind}: {message}")


def public_address(url: str) -> str:
    """A server's address without a name and a password in it."""
    return str(httpx.URL(base_of(url)).copy_with(userinfo=b""))


def allow_connections(count: int) -> None:
    """Let this process, and those that it starts, hold `count` connections if the system does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
