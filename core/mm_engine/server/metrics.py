"""What `/metrics` shows: the server's own counts, and the engine's as of the scrape."""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from mm_engine.contract import contract_version
from mm_engine.inputs.fetch import OUTCOMES, Outcome
from mm_engine.plugins.record import PluginRecord
from mm_engine.server.errors import REJECTIONS

if TYPE_CHECKING:
    from mm_engine.engine.status import EngineStats
    from mm_engine.inputs.processed_items import ProcessedItems

SECONDS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
    *(60, 120, 300, 600, 1800),  # on a CPU, a long answer takes minutes
)
TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
#: Why completions end. "abort": the client left, or lost them with another prompt of its request
#: that was refused. "error": a plugin or the engine failed, or the server was shut down meanwhile.
REASONS = ("stop", "length", "abort", "error")

#: Fields of `EngineStats`, with the names of vLLM's metrics where the meaning is the same.
_GAUGES = {
    "num_requests_running": ("num_running", "Sequences that take part in steps"),
    "num_requests_waiting": (
        "num_waiting",
        "Sequences that wait for their first step, or to be recomputed",
    ),
    "num_used_blocks": ("num_used_blocks", "Blocks of the KV cache in use"),
    "num_kept_blocks": (
        "num_kept_blocks",
        "Blocks of the KV cache, in use or free, that a prompt may find",
    ),
    "num_blocks": ("num_blocks", "Blocks of the KV cache"),
    "encoder_rows": ("encoder_rows", "Rows of image features that are kept"),
    "max_encoder_rows": ("max_encoder_rows", "Rows of image features that can be kept"),
}
_COUNTERS = {
    "num_preemptions": (
        "num_preemptions",
        "Sequences that gave up their blocks to be recomputed later",
    ),
    "prompt_tokens": ("num_prompt_tokens", "Tokens of prompts, found or computed"),
    "generation_tokens": ("num_generation_tokens", "Tokens generated"),
    "steps": ("num_steps", "Steps of the engine"),
    "encodes": ("num_encodes", "Images that were encoded"),
    "spec_decode_num_drafts": ("num_drafts", "Times that tokens of an answer were guessed"),
    "spec_decode_num_draft_tokens": ("num_draft_tokens", "Tokens that were guessed"),
    "spec_decode_num_accepted_tokens": (
        "num_accepted_tokens",
        "Guessed tokens that were those of the answer",
    ),
}
#: What is counted in each cache.
_CACHES = {
    "prefix_cache": "Tokens of admitted prompts (KV cache)",
    "encoder_cache": "Images that prompts came to (features)",
    "mm_cache": "Images that arrived (tensors of the image processor)",
}


class CacheCounts(NamedTuple):
    """How often a cache was asked since the start, and how often it had what was wanted."""

    queries: int
    hits: int

    @property
    def rate(self) -> float:
        """Hits by queries, 0 if there were none."""
        return self.hits / self.queries if self.queries else 0.0

    def since(self, before: CacheCounts) -> CacheCounts:
        """The counts between then and now."""
        return CacheCounts(self.queries - before.queries, self.hits - before.hits)


def cache_counts(stats: EngineStats, processed: ProcessedItems) -> dict[str, CacheCounts]:
    """The counts of all three caches, by name."""
    num_images = stats.num_encoder_hits + stats.num_encodes
    return {
        "prefix_cache": CacheCounts(stats.num_prefix_queries, stats.num_prefix_hits),
        "encoder_cache": CacheCounts(num_images, stats.num_encoder_hits),
        "mm_cache": CacheCounts(processed.num_queries, processed.num_hits),
    }


class EngineCollector:
    """The engine's own numbers, as it told them last; none if it is gone."""

    def __init__(self, processed: ProcessedItems) -> None:
        self.stats: EngineStats | None = None
        self.alive = True
        self._processed = processed

    def collect(self) -> Iterable[Metric]:
        """Yield a metric for each number (called by prometheus_client)."""
        stats = self.stats
        yield GaugeMetricFamily(
            "mm_engine_up", "Whether the engine process lives", float(self.alive)
        )
        if stats is None or not self.alive:
            return
        for name, (field, text) in _GAUGES.items():
            yield GaugeMetricFamily(f"mm_engine_{name}", text, getattr(stats, field))
        yield GaugeMetricFamily(
            "mm_engine_kv_cache_usage_perc",
            "Share of the KV cache's blocks in use; 1 is all of them",
            stats.num_used_blocks / stats.num_blocks,
        )
        for name, (field, text) in _COUNTERS.items():
            yield CounterMetricFamily(f"mm_engine_{name}", text, getattr(stats, field))
        for name, counts in cache_counts(stats, self._processed).items():
            text = _CACHES[name]
            yield CounterMetricFamily(f"mm_engine_{name}_queries", text, counts.queries)
            yield CounterMetricFamily(
                f"mm_engine_{name}_hits", f"{text} that were there already", counts.hits
            )
            yield GaugeMetricFamily(
                f"mm_engine_{name}_hit_rate", "Hits by queries since the start", counts.rate
            )


class SharedHistogram:
    """A histogram that counts several equal values as fast as one: tokens that are told together
    share their time, and there are many."""

    def __init__(self, name: str, text: str, buckets: Sequence[float], registry: CollectorRegistry):
        self._name = name
        self._text = text
        self._bounds = [float(bound) for bound in buckets]
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float, count: int) -> None:
        """Count a value so many times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterable[Metric]:
        """Yield the histogram (called by prometheus_client)."""
        names = (*map(str, self._bounds), "+Inf")
        buckets = list(zip(names, itertools.accumulate(self._counts), strict=True))
        family = HistogramMetricFamily(self._name, self._text)
        family.add_metric([], buckets, self._sum)
        yield family


class Metrics:
    """The server's metrics, in a registry of their own."""

    def __init__(self, plugin: PluginRecord, processed: ProcessedItems) -> None:
        self.registry = CollectorRegistry()
        served = Gauge(
            "mm_engine_plugin_info",
            "The plugin that serves the model, and the version of the hooks' contract; always 1",
            ["distribution", "version", "architecture", "contract"],
            registry=self.registry,
        )
        contract = contract_version()
        served.labels(plugin.distribution, plugin.version, plugin.architecture, contract).set(1)
        build = self._gauge(
            "build_info", "The version of mm-engine that runs; always 1", ["version"]
        )
        build.labels(metadata.version("mm-engine")).set(1)
        self._gauge("start_time_seconds", "When the server started, in seconds since 1970").set(
            time.time()
        )
        self.engine = EngineCollector(processed)
        self.registry.register(self.engine)
        self.requests = Counter(
            "mm_engine_requests",
            "HTTP requests answered",
            ["route", "status"],
            registry=self.registry,
        )
        self.http_seconds = Histogram(
            "mm_engine_http_request_duration_seconds",
            "From an HTTP request's arrival to its last byte, whatever the answer",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.rejected = Counter(
            "mm_engine_requests_rejected",
            f"POST requests that weren't taken, by the reason: {', '.join(REJECTIONS)}",
            ["reason"],
            registry=self.registry,
        )
        for reason in REJECTIONS:
            self.rejected.labels(reason)  # shown from the start, as 0
        self.plugin_errors = Counter(
            "mm_engine_plugin_errors",
            "Requests that failed because a plugin broke its contract",
            registry=self.registry,
        )
        self.in_flight = self._gauge("num_requests_in_flight", "Completion requests being answered")
        self.tasks = self._gauge(
            "num_tasks",
            "Tasks of the server's event loop that haven't ended, this answer's included",
        )
        self.queued_prompts = self._gauge(
            "num_queued_prompts", "Prompts that are admitted and not yet answered, running or not"
        )
        self.max_queued_prompts = self._gauge(
            "max_queued_prompts",
            "The most of them, but for a longer list that comes alone (--max-queued-requests)",
        )
        self.queued_tokens = self._gauge(
            "num_queued_tokens", "Tokens of admitted prompts that have no token of an answer yet"
        )
        self.max_queued_tokens = self._gauge(
            "max_queued_tokens",
            "The most of them; more are refused with status 429 (--max-queued-tokens)",
        )
        self.restarts = Counter(
            "mm_engine_restarts",
            "Engines that were started in the place of one that had died",
            registry=self.registry,
        )
        self.request_seconds = self._histogram(
            "e2e_request_latency_seconds", "From a completion request's arrival to its last byte"
        )
        self.first_token_seconds = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token"
        )
        self.token_seconds = SharedHistogram(
            "mm_engine_inter_token_latency_seconds",
            "Between one token and the next of a completion",
            SECONDS,
            self.registry,
        )
        self.queue_seconds = self._histogram(
            "request_queue_time_seconds",
            "From a request's arrival in the engine to the first step that it takes part in",
        )
        self.prefill_seconds = self._histogram(
            "request_prefill_time_seconds", "From a request's first step to its first token"
        )
        self.decode_seconds = self._histogram(
            "request_decode_time_seconds", "From a completion's first token to its last"
        )
        self.mean_token_seconds = self._histogram(
            "request_time_per_output_token_seconds",
            "A completion's mean time from one token to the next (TPOT); none with a single token",
        )
        self.prompt_tokens = self._histogram(
            "request_prompt_tokens", "Tokens of a request's prompt, images included", TOKENS
        )
        self.generation_tokens = self._histogram(
            "request_generation_tokens", "Tokens of a completion", TOKENS
        )
        self.ended = Counter(
            "mm_engine_request_success",
            f"Completions that ended, by the reason: {', '.join(REASONS)}",
            ["finished_reason"],
            registry=self.registry,
        )
        for reason in REASONS:
            self.ended.labels(reason)
        self._fetches = Counter(
            "mm_engine_media_fetches",
            f"Images fetched from other hosts, by how that ended: {', '.join(OUTCOMES)}",
            ["outcome"],
            registry=self.registry,
        )
        for outcome in OUTCOMES:
            self._fetches.labels(outcome)
        self._fetch_seconds = self._histogram(
            "media_fetch_seconds", "From the start of an image's fetch to its end, however it ended"
        )
        ProcessCollector(registry=self.registry)  # of the server's process; Linux alone tells

    def fetch_ended(self, outcome: Outcome, seconds: float | None) -> None:
        """Count an image that was fetched, or that couldn't be; None if it never began."""
        self._fetches.labels(outcome).inc()
        if seconds is not None:
            self._fetch_seconds.observe(seconds)

    def text(self, stats: EngineStats | None, *, alive: bool) -> bytes:
        """All metrics in Prometheus' text format.

        `stats` is None if the engine told none: the last ones stand while it is `alive`, since a
        step may take longer than a scrape waits.
        """
        self.engine.stats = stats or self.engine.stats
        self.engine.alive = alive
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(f"mm_engine_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float] = SECONDS) -> Histogram:
        return Histogram(f"mm_engine_{name}", text, buckets=buckets, registry=self.registry)
