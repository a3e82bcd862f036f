"""Prometheus metrics: calls answered, their times, and the scheduler's counters."""

import time
from collections.abc import Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from minisgl.engine.client import ProcessClient
from minisgl.server.generate import Part, Usage

_TTFT_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
_ITL_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_E2E_BUCKETS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)

# Attribute of the scheduler's figures -> (metric, its help text).
_GAUGES = {
    "num_running": ("minisgl_running_sequences", "Sequences that hold a row"),
    "num_waiting": ("minisgl_waiting_sequences", "Sequences that wait for a row or for pages"),
    "num_pages": ("minisgl_kv_pages", "Pages of the KV pool"),
    "num_free_pages": ("minisgl_kv_pages_free", "Free pages"),
    "draft_gain": ("minisgl_draft_gain", "Tokens per second with drafts, divided by those without"),
    "num_idle_pages": ("minisgl_kv_pages_idle", "Pages held by the prefix cache alone"),
}
_COUNTERS = {
    "num_queried_tokens": ("minisgl_cache_queried_tokens", "Prompt tokens looked up in the cache"),
    "num_hit_tokens": ("minisgl_cache_hit_tokens", "Prompt tokens found in the cache"),
    "num_spared_tokens": (
        "minisgl_cascade_spared_tokens",
        "Tokens of shared prefixes that decoding did not read again",
    ),
    "num_drafts": ("minisgl_draft_tokens", "Draft tokens verified"),
    "num_accepted_drafts": ("minisgl_accepted_draft_tokens", "Draft tokens accepted"),
    "num_preemptions": (
        "minisgl_preemptions",
        "Running sequences stopped to free pages; they are recomputed later",
    ),
}


class Metrics:
    """The figures of one server, in a registry of its own."""

    def __init__(self, engine: ProcessClient) -> None:
        registry = self._registry = CollectorRegistry()
        count, seconds = partial(Counter, registry=registry), partial(Histogram, registry=registry)
        self.requests = count(
            "minisgl_requests",
            "API calls by their end: ok, refused (4xx), failed (5xx), disconnected",
            ["endpoint", "outcome"],
        )
        self.finishes = count("minisgl_finished_choices", "Choices by finish reason", ["reason"])
        self.prompt_tokens = count("minisgl_prompt_tokens", "Prompt tokens of answered calls")
        self.output_tokens = count("minisgl_output_tokens", "Tokens generated")
        self.ttft = seconds(
            "minisgl_time_to_first_token_seconds",
            "From the call's arrival to its first token",
            buckets=_TTFT_BUCKETS,
        )
        self.itl = seconds(
            "minisgl_inter_token_latency_seconds",
            "Between consecutive outputs of one choice, divided by their tokens",
            buckets=_ITL_BUCKETS,
        )
        self.e2e = seconds(
            "minisgl_request_seconds",
            "From a call's arrival to its last token",
            buckets=_E2E_BUCKETS,
        )
        registry.register(_EngineFigures(engine))

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)


class CallClock:
    """Observes the parts of one call, which arrives now, as they come."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._start = time.perf_counter()
        self._last: dict[int, float] = {}  # choice -> when its latest token came

    def part(self, part: Part) -> None:
        if not part.num_tokens:
            return
        now, m = time.perf_counter(), self._metrics
        m.output_tokens.inc(part.num_tokens)
        if not self._last:
            m.ttft.observe(now - self._start)
        elif part.choice in self._last:
            m.itl.observe((now - self._last[part.choice]) / part.num_tokens)
        self._last[part.choice] = now
        if part.finish_reason is not None:
            m.finishes.labels(part.finish_reason).inc()

    def end(self, usage: Usage) -> None:
        self._metrics.prompt_tokens.inc(usage.prompt_tokens)
        self._metrics.e2e.observe(time.perf_counter() - self._start)


class _EngineFigures(Collector):
    """The scheduler's own figures, read at every scrape."""

    def __init__(self, engine: ProcessClient) -> None:
        self._engine = engine

    def describe(self) -> list[Metric]:
        return []  # known only once the engine runs

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        if stats is None:
            return
        for name, (metric, help_text) in _GAUGES.items():
            yield GaugeMetricFamily(metric, help_text, getattr(stats.scheduler, name))
        for name, (metric, help_text) in _COUNTERS.items():
            yield CounterMetricFamily(metric, help_text, getattr(stats.scheduler, name))
        yield CounterMetricFamily(
            "minisgl_compilations_after_ready",
            "Kernels compiled while serving; 0 unless warm-up missed one",
            stats.compilations,
        )
