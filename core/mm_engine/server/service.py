"""What the endpoints share: engine, pipeline, admission, drain."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, TypeVar

import anyio
from anyio import to_thread
from PIL import Image

from mm_engine.errors import EngineDead, Overloaded, RequestError
from mm_engine.inputs.addresses import is_public
from mm_engine.inputs.fetch import Fetcher
from mm_engine.inputs.grammar_compiler import MAX_WAITING, GrammarCompiler
from mm_engine.inputs.local_files import MediaFolder
from mm_engine.inputs.media import ImageSource, MediaLimits, check_count, load_images
from mm_engine.inputs.remote_urls import parse_allowed_hosts
from mm_engine.request import Request
from mm_engine.server.answer import Answer
from mm_engine.server.keys import KeyLimits, current_key
from mm_engine.server.metrics import Metrics
from mm_engine.server.queue_time import QueueTime
from mm_engine.server.settings import ServerSettings
from mm_engine.server.structure import StructureFields

if TYPE_CHECKING:
    from mm_engine.engine.client import EngineClient
    from mm_engine.inputs.pipeline import InputPipeline
    from mm_engine.server.tracing import Traces

T = TypeVar("T")
RESTART_SECONDS = 5  # after which a client may ask again, while an engine is started


class Slots:
    """A share of the queue: one for each prompt of a request, given back when it is left.

    And the tokens of its prompts, until the first token of an answer. Before the last bytes of an
    answer are sent, all is to be given back: whoever has them may ask again at once.
    """

    def __init__(self, service: Service, key: bytes | None) -> None:
        """`key` is the digest of the request's API key; None without one."""
        self._service = service
        self._key = key
        self._counts_for_key = False
        self.num_prompts = 0
        self.num_tokens = 0
        self._waits = False

    def count_for_key(self) -> None:
        """Be one of its key's requests.

        Raises:
            Overloaded: those are as many as may be.
        """
        self._service.keys.begin(self._key)
        self._counts_for_key = True

    def wait(self) -> None:
        """Wait for the first token of an answer.

        Raises:
            Overloaded: that would take longer than anybody is to wait.
        """
        queue, limit = self._service.queue, self._service.settings.max_queue_seconds
        if limit is not None and (seconds := queue.seconds) > limit:
            raise Overloaded(
                f"the queue is too long: about {math.ceil(seconds)} s to a first token. Send the "
                "request again later.",
                retry_after=math.ceil(seconds - limit),
            )
        queue.join()
        self._waits = True

    def take(self, num_prompts: int) -> None:
        """Have this many in all. More than the limit have to be alone, as with tokens.

        Raises:
            Overloaded: more than the queue holds now.
        """
        limit = self._service.settings.max_queued_requests
        others = self._service.num_prompts - self.num_prompts
        if others and num_prompts > limit:
            raise Overloaded(
                f"the queue is full: {num_prompts} prompts at once are taken only while no others "
                f"are there. Send at most {limit} at once."
            )
        if others and others + num_prompts > limit:
            raise Overloaded(f"the queue is full: {limit} prompts. Send the request again later.")
        self._service.num_prompts += num_prompts - self.num_prompts
        self.num_prompts = num_prompts

    def take_tokens(self, requests: Sequence[Request]) -> None:
        """Have the tokens of these prompts in the queue, too.

        One that is larger than the limit has to be alone: it is taken where nothing waits.

        Raises:
            Overloaded: those before them are too many.
        """
        waiting, limit = self._service.num_tokens, self._service.settings.max_queued_tokens
        num_tokens = sum(len(request.prompt_token_ids) for request in requests)
        if waiting and waiting + num_tokens > limit:
            raise Overloaded(
                f"the queue is full: {waiting} tokens of prompts wait. Send the request again "
                "later."
            )
        self._service.num_tokens += num_tokens
        self.num_tokens = num_tokens

    def begun(self) -> None:
        """The prompts have been computed, or the first of them."""
        if self._waits:
            self._service.queue.begin()
            self._waits = False
        self._service.num_tokens -= self.num_tokens
        self.num_tokens = 0

    def give_back(self) -> None:
        """Have nothing any more; a second call does nothing."""
        if self._counts_for_key:
            self._service.keys.end(self._key)
            self._counts_for_key = False
        if self._waits:
            self._service.queue.leave()
            self._waits = False
        self.begun()
        self._service.num_prompts -= self.num_prompts
        self.num_prompts = 0


def bound_salt(key: bytes | None, asked: str) -> str:
    """The salt that a request asked for, bound to its API key (by the digest) if it has one.

    Then a salt means something only to those who hold the key, and nobody can tell by its speed
    whether a prompt was sent with another key.
    """
    if key is None:
        return asked
    return hmac.new(key, asked.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


class Service:
    """One engine behind one HTTP server. Used from the event loop's thread only."""

    def __init__(
        self, client: EngineClient, pipeline: InputPipeline, settings: ServerSettings
    ) -> None:
        self.client = client
        self.pipeline = pipeline
        self.settings = settings
        self.metrics = Metrics(pipeline.plugin.record, pipeline.processed)
        self.num_prompts = 0  # admitted and not yet answered
        self.metrics.queued_prompts.set_function(lambda: self.num_prompts)
        self.metrics.max_queued_prompts.set(settings.max_queued_requests)
        self.num_tokens = 0  # of prompts, admitted and without a token of an answer
        self.metrics.queued_tokens.set_function(lambda: self.num_tokens)
        self.metrics.max_queued_tokens.set(settings.max_queued_tokens)
        self.queue = QueueTime()
        self.draining = False
        self.restarting = False  # the engine has died, and another is being started
        self.traces: Traces | None = None
        max_images = pipeline.ctx.limits.get("image", 0)
        self.media_limits = dataclasses.replace(settings.media, max_images=max_images)
        self._fetcher = _fetcher(settings, self.media_limits, self.metrics)
        path = settings.allowed_local_media_path
        self._media_folder = None if path is None else MediaFolder(path)
        self._expired = False
        self.keys = KeyLimits(settings.max_requests_per_key, settings.max_requests_per_minute)
        self._answers: set[Answer] = set()
        self._input_threads = anyio.CapacityLimiter(settings.max_input_threads)
        self._grammars = GrammarCompiler(pipeline.grammars, settings.grammar_timeout)
        # One more than may wait, so that it is said when those are too many.
        self._grammar_threads = anyio.CapacityLimiter(MAX_WAITING + 1)

    @property
    def model_name(self) -> str:
        """The name that answers carry."""
        return self.settings.served_model_names[0]

    def check_model(self, name: str | None) -> None:
        """Refuse a request for another model than the one that is served.

        Raises:
            RequestError: 404, with OpenAI's code.
        """
        known = self.settings.served_model_names + self.settings.hidden_model_names
        if name is not None and name not in known:
            raise RequestError(
                "the model is not served here. GET /v1/models lists the one that is.",
                param="model",
                status=404,
                code="model_not_found",
            )

    def check_priority(self, asked: int | None) -> None:
        """Refuse a priority unless the server was told that its clients may preempt each other.

        Raises:
            RequestError: it isn't 0, and the policy is first come, first served.
        """
        if asked and self.settings.scheduling_policy != "priority":
            raise RequestError(
                "priority isn't offered by this server. Leave it out, or start the server with "
                "--scheduling-policy priority.",
                param="priority",
            )

    def cache_salt(self, asked: str | None) -> str:
        """What separates a request from others in all caches; see `bound_salt`."""
        return bound_salt(current_key.get(), asked or "")

    def check_ready(self) -> None:
        """Refuse work that can't be done.

        Raises:
            EngineDead: the engine process is gone.
            Overloaded: 503, the server is shutting down.
        """
        if self.draining:
            raise self._stopping()
        self.check_alive()

    def check_alive(self) -> None:
        """Refuse what needs the engine.

        Raises:
            EngineDead: the engine process is gone.
        """
        if self.restarting:
            raise EngineDead(
                "the engine has stopped, and is being started again. Send the request again later.",
                retry_after=RESTART_SECONDS,
            )
        if not self.client.alive:
            raise EngineDead("the engine has stopped. Restart the server.")

    @contextmanager
    def admit(self) -> Iterator[Slots]:
        """Admit one request, as one prompt for now; its share is free again afterwards.

        Raises:
            EngineDead, Overloaded: it can't be taken.
        """
        self.check_ready()
        slots = Slots(self, current_key.get())
        try:
            slots.take(1)
            slots.count_for_key()
            yield slots
        finally:
            slots.give_back()

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run blocking input work (decoding, hooks); so many at a time, the others wait."""
        return await to_thread.run_sync(work, limiter=self._input_threads)

    async def compile_grammar(self, asked: StructureFields) -> bytes | None:
        """What a request carries that asked for structured output; None if it didn't.

        Raises:
            RequestError: it can't be compiled, or not in time.
            Overloaded: too many others wait.
        """
        structure = asked.structure
        if structure is None:
            return None
        key, left = current_key.get(), threading.Event()
        try:
            return await to_thread.run_sync(
                lambda: self._grammars.compile(structure, key, left),
                limiter=self._grammar_threads,
                abandon_on_cancel=True,  # it ends soon after `left` is set
            )
        except RequestError as error:
            error.param = asked.structure_field
            raise
        finally:
            left.set()

    async def close(self) -> None:
        """End what was started for requests."""
        await to_thread.run_sync(self._grammars.close)

    async def with_images(
        self, sources: Sequence[ImageSource], work: Callable[[list[Image.Image]], T]
    ) -> T:
        """Run blocking input work on a request's images; the one way for images into the server.

        They are fetched first, as far as that is allowed, then decoded in the thread that does the
        work: so decoded images exist only for as many requests as are worked on.

        Raises:
            RequestError: an image is refused; which limits there are is `MediaLimits`' to say.
            Overloaded: too many images are being fetched.
        """
        check_count(len(sources), self.media_limits)
        if self._fetcher is not None:
            sources = await self._fetcher.fetch_all(sources)
        return await self.in_thread(
            lambda: work(load_images(sources, self.media_limits, self._media_folder))
        )

    @contextmanager
    def answering(self, answer: Answer) -> Iterator[None]:
        """Let an answer be ended by the drain's deadline while it is used.

        Raises:
            Overloaded: the deadline has passed already.
        """
        if self._expired:
            raise self._stopping()
        self._answers.add(answer)
        try:
            yield
        finally:
            self._answers.discard(answer)

    def drain(self) -> None:
        """Take no more requests; those that were admitted go on."""
        self.draining = True

    def expire(self) -> None:
        """End what is still being answered, each with a proper error."""
        self.drain()
        self._expired = True
        for answer in self._answers:
            answer.fail(self._stopping())

    @staticmethod
    def _stopping() -> Overloaded:
        return Overloaded(
            "the server is shutting down. Send the request again later.",
            status=503,
            retry_after=5,
            reason="draining",
        )


def _fetcher(settings: ServerSettings, limits: MediaLimits, metrics: Metrics) -> Fetcher | None:
    """What fetches images, if there are hosts from which that is allowed."""
    allowed = parse_allowed_hosts(settings.allowed_media_domains)
    networks = [ip_network(network) for network in settings.private_media_networks]

    def may_dial(address: str) -> bool:
        return is_public(address) or any(ip_address(address) in network for network in networks)

    if not allowed:
        return None
    return Fetcher(allowed, limits, on_end=metrics.fetch_ended, may_dial=may_dial)
