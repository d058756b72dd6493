"""What the endpoints share: engine, pipeline, admission, drain."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import anyio
from anyio import to_thread

from mm_engine.errors import EngineDead, Overloaded, RequestError
from mm_engine.server.answer import Answer
from mm_engine.server.metrics import Metrics
from mm_engine.server.settings import ServerSettings

if TYPE_CHECKING:
    from mm_engine.engine.client import EngineClient
    from mm_engine.inputs.pipeline import InputPipeline
    from mm_engine.server.tracing import Traces

T = TypeVar("T")


class Slots:
    """A share of the queue: one for each prompt of a request, given back when it is left."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.num_prompts = 0

    def take(self, num_prompts: int) -> None:
        """Have this many in all.

        Raises:
            RequestError: more than the queue could ever hold.
            Overloaded: more than it holds now.
        """
        limit = self._service.settings.max_queued_requests
        if num_prompts > limit:
            raise RequestError(
                f"too many prompts: {num_prompts}. Send at most {limit} at once.", param="prompt"
            )
        if self._service.num_prompts + num_prompts - self.num_prompts > limit:
            raise Overloaded(f"the queue is full: {limit} prompts. Send the request again later.")
        self._service.num_prompts += num_prompts - self.num_prompts
        self.num_prompts = num_prompts


def bound_salt(api_key: str | None, asked: str) -> str:
    """The salt that a request asked for, bound to the API key if one is set.

    Then a salt means something only to those who hold the key, and nobody can tell by its speed
    whether a prompt was sent with another key.
    """
    if api_key is None:
        return asked
    secret, salt = (text.encode("utf-8", "surrogatepass") for text in (api_key, asked))
    return hmac.new(secret, salt, hashlib.sha256).hexdigest()


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
        self.draining = False
        self.traces: Traces | None = None
        max_images = pipeline.ctx.limits.get("image", 0)
        self.media_limits = dataclasses.replace(settings.media, max_images=max_images)
        self._expired = False
        self._answers: set[Answer] = set()
        self._input_threads = anyio.CapacityLimiter(settings.max_input_threads)

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
        return bound_salt(self.settings.api_key, asked or "")

    def check_ready(self) -> None:
        """Refuse work that can't be done.

        Raises:
            EngineDead: the engine process is gone.
            Overloaded: 503, the server is shutting down.
        """
        if not self.client.alive:
            raise EngineDead("the engine has stopped. Restart the server.")
        if self.draining:
            raise self._stopping()

    @contextmanager
    def admit(self) -> Iterator[Slots]:
        """Admit one request, as one prompt for now; its share is free again afterwards.

        Raises:
            EngineDead, Overloaded: it can't be taken.
        """
        self.check_ready()
        slots = Slots(self)
        slots.take(1)
        try:
            yield slots
        finally:
            self.num_prompts -= slots.num_prompts

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run blocking input work (decoding, hooks); so many at a time, the others wait."""
        return await to_thread.run_sync(work, limiter=self._input_threads)

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
            "the server is shutting down. Send the request again later.", status=503, retry_after=5
        )
