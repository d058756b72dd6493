"""What `/metrics` shows: the server's own counts, and the engine's as of the scrape."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mm_engine.contract import contract_version
from mm_engine.plugins.record import PluginRecord

if TYPE_CHECKING:
    from mm_engine.engine.status import EngineStats

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

#: Fields of `EngineStats`: those that only grow are counters.
_GAUGES = {
    "num_running": "Sequences that take part in steps",
    "num_waiting": "Sequences that wait for their first step, or to be recomputed",
    "num_used_blocks": "Blocks of the KV cache in use",
    "num_blocks": "Blocks of the KV cache",
    "encoder_rows": "Rows of image features that are kept",
    "max_encoder_rows": "Rows of image features that can be kept",
}
_COUNTERS = {
    "num_encoder_hits": "Images whose features were kept from before",
    "num_encodes": "Images that were encoded",
    "num_preemptions": "Sequences that gave up their blocks to be recomputed later",
    "num_prompt_tokens": "Tokens of prompts computed",
    "num_generation_tokens": "Tokens generated",
    "num_steps": "Steps of the engine",
}


class EngineCollector:
    """The engine's own numbers, as it told them last; none if it is gone."""

    def __init__(self) -> None:
        self.stats: EngineStats | None = None

    def collect(self) -> Iterable[Metric]:
        """Yield a metric for each number (called by prometheus_client)."""
        yield GaugeMetricFamily(
            "mm_engine_up", "Whether the engine process lives", float(self.stats is not None)
        )
        values = dataclasses.asdict(self.stats) if self.stats is not None else {}
        for name, text in _GAUGES.items():
            if name in values:
                yield GaugeMetricFamily(f"mm_engine_{name}", text, values[name])
        for name, text in _COUNTERS.items():
            if name in values:
                plain = name.removeprefix("num_")
                yield CounterMetricFamily(f"mm_engine_{plain}", text, values[name])


class Metrics:
    """The server's metrics, in a registry of their own."""

    def __init__(self, plugin: PluginRecord) -> None:
        self.registry = CollectorRegistry()
        served = Gauge(
            "mm_engine_plugin_info",
            "The plugin that serves the model, and the version of the hooks' contract; always 1",
            ["distribution", "version", "architecture", "contract"],
            registry=self.registry,
        )
        contract = contract_version()
        served.labels(plugin.distribution, plugin.version, plugin.architecture, contract).set(1)
        self.engine = EngineCollector()
        self.registry.register(self.engine)
        self.requests = Counter(
            "mm_engine_requests",
            "HTTP requests answered",
            ["route", "status"],
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "mm_engine_num_requests_in_flight",
            "Completion requests being answered",
            registry=self.registry,
        )
        self.request_seconds = self._histogram(
            "request_seconds", "From a completion request's arrival to its last byte"
        )
        self.first_token_seconds = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token"
        )
        self.token_seconds = self._histogram(
            "inter_token_seconds", "Between one token and the next of a completion"
        )

    def text(self, stats: EngineStats | None) -> bytes:
        """All metrics in Prometheus' text format."""
        self.engine.stats = stats
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"mm_engine_{name}", text, buckets=SECONDS, registry=self.registry)
