"""Prometheus metrics of the front: requests, tokens, times and depths. Labels never come from a request's text."""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE

from tide_ray.serve.errors import Failure

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class ServerMetrics:
    """Has a registry of its own: several applications in one process do not meet."""

    content_type = CONTENT_TYPE

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter("tide_requests", "Answered requests", "model", "endpoint", "status")
        self._refused = self._counter("tide_refused_requests", "Requests that no model saw", "status", "code")
        self._prompt_tokens = self._counter("tide_prompt_tokens", "Prompt tokens", "model")
        self._generated = self._counter("tide_generated_tokens", "Generated tokens", "model")
        self._depths = self._counter("tide_generated_tokens_by_depth", "Generated tokens", "model", "depth")
        self._seconds = self._histogram("tide_request_seconds", "Whole requests", SECONDS)
        self._first = self._histogram("tide_time_to_first_token_seconds", "To a stream's first token", SECONDS)
        self._each = self._histogram("tide_time_per_token_seconds", "A token after the first, mean", TOKEN_SECONDS)
        self._running = Gauge("tide_requests_running", "Being answered", ["model"], registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, f"{text}, seconds", ["model"], buckets=buckets, registry=self._registry)

    def refused(self, failure: Failure) -> None:
        self._refused.labels(str(failure.status), failure.code or "").inc()

    def began(self, model: str) -> None:
        self._running.labels(model).inc()

    def ended(self, model: str, endpoint: str, status: int, seconds: float) -> None:
        self._running.labels(model).dec()
        self._requests.labels(model, endpoint, str(status)).inc()
        self._seconds.labels(model).observe(seconds)

    def tokens(self, model: str, num_prompt_tokens: int, depths: Sequence[int]) -> None:
        """Count what one request used, at its end, however it ended."""
        self._prompt_tokens.labels(model).inc(num_prompt_tokens)
        self._generated.labels(model).inc(len(depths))
        for depth, count in Count(depths).items():
            self._depths.labels(model, str(depth)).inc(count)

    def stream_times(self, model: str, first: float | None, last: float | None, num_tokens: int) -> None:
        """Seconds from the request to its first and to its last token."""
        if first is None or last is None:
            return
        self._first.labels(model).observe(first)
        if num_tokens > 1:
            self._each.labels(model).observe((last - first) / (num_tokens - 1))

    def text(self) -> bytes:
        return generate_latest(self._registry)
