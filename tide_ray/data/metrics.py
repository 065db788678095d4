"""What an engine does, for Prometheus: a thread of its process reads the engine's own counters once a second and hands
them to Ray, whose nodes export them. Nothing is counted or sent within a step.

Ray exports ``tide_tokens`` as ``ray_tide_tokens_total``, gauges as ``ray_tide_queue_depth``; the tag ``job`` tells jobs
apart, and Ray adds the node and the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tide_ray.engine.engine import TideEngine

PERIOD_SECONDS = 1.0
EXPORT_PREFIX, COUNTER_SUFFIX = "ray_", "_total"
JOB_TAG = "job"
ADMISSION = "admission"
"""Queue of requests that hold no K/V yet, beside those of the stages."""

Values = Mapping[str, float] | float
"""A number, or numbers by the value of the metric's own tag."""


@dataclass(frozen=True, slots=True)
class EngineMetric:
    """One metric. ``read`` is called in another thread than the engine's: it may copy what the engine has, no more."""

    name: str
    description: str
    read: Callable[[TideEngine], Values]
    is_counter: bool = True
    tag: str | None = None

    @property
    def exported_name(self) -> str:
        """Under which Ray's nodes export it."""
        return f"{EXPORT_PREFIX}{self.name}{COUNTER_SUFFIX if self.is_counter else ''}"


def _by_depth(engine: TideEngine) -> Values:
    return {str(depth): count for depth, count in dict(engine.stats.tokens_at_depth).items()}


def _full_layer_runs(engine: TideEngine) -> Values:
    runs = engine.stats.rows_through_layer
    return max(runs) * len(runs)


def _queues(engine: TideEngine) -> Values:
    residents = list(engine.scheduler.residents)
    waiting = {
        stage.name: sum(sequence.stage == number for sequence in residents)
        for number, stage in enumerate(engine.runner.stages)
        if number
    }
    return {ADMISSION: len(engine.scheduler.waiting), **waiting}


def _kv_use(engine: TideEngine) -> Values:
    return 1 - engine.scheduler.pool.num_free / engine.num_kv_pages


def _certified(engine: TideEngine) -> Values:
    certificate = engine.certificate
    if certificate is None:
        return {}
    return {"bound": certificate.epsilon, "measured": certificate.mean_loss}


METRICS = (
    EngineMetric("tide_tokens", "generated tokens", lambda e: e.stats.num_generated_tokens),
    EngineMetric("tide_tokens_by_depth", "generated tokens by layers run", _by_depth, tag="depth"),
    EngineMetric("tide_prompt_tokens", "prompt tokens", lambda e: e.stats.num_prompt_tokens),
    EngineMetric("tide_cached_tokens", "prompt tokens from the prefix cache", lambda e: e.stats.num_cached_tokens),
    EngineMetric("tide_prompt_exits", "prompt tokens that stopped early", lambda e: e.stats.num_prefill_exits),
    EngineMetric("tide_requests", "finished requests", lambda e: e.stats.num_finished_requests),
    EngineMetric("tide_rejected_requests", "requests that cannot be run", lambda e: e.stats.num_rejected_requests),
    EngineMetric("tide_layer_runs", "rows times layers run", lambda e: sum(e.stats.rows_through_layer)),
    EngineMetric("tide_full_layer_runs", "what full depth would have run of the same rows", _full_layer_runs),
    EngineMetric("tide_steps", "engine steps", lambda e: e.stats.num_steps),
    EngineMetric("tide_launches", "launches", lambda e: dict(e.stats.launches), tag="stage"),
    EngineMetric("tide_deferred_rows", "rows run later for K/V", lambda e: dict(e.stats.deferred_rows), tag="stage"),
    EngineMetric("tide_filled_rows", "rows whose K/V were filled", lambda e: e.stats.num_filled_rows),
    EngineMetric("tide_accepted_drafts", "drafts that full depth confirmed", lambda e: e.stats.num_accepted_drafts),
    EngineMetric("tide_rejected_drafts", "drafts unlike full depth's token", lambda e: e.stats.num_rejected_drafts),
    EngineMetric("tide_preemptions", "sequences computed again for want of pages", lambda e: e.stats.num_preemptions),
    EngineMetric("tide_queue_depth", "requests or residents that wait", _queues, is_counter=False, tag="stage"),
    EngineMetric("tide_residents", "sequences that hold K/V", lambda e: len(e.scheduler.residents), is_counter=False),
    EngineMetric(
        "tide_occupancy", "residents over most residents", lambda e: len(e.scheduler.residents) / e.max_num_seqs,
        is_counter=False,
    ),
    EngineMetric("tide_kv_use", "share of K/V pages that sequences hold", _kv_use, is_counter=False),
    EngineMetric(
        "tide_certified_disagreement", "tokens unlike full depth's: certified bound, and mean when certified",
        _certified, is_counter=False, tag="of",
    ),
)  # fmt: skip


class MetricsPublisher:
    """Publishes the metrics of one engine at a time, from a thread of its own, until it is closed.

    Args:
        job: value of the tag ``job``.
    """

    def __init__(self, job: str) -> None:
        from ray.util.metrics import Counter, Gauge

        self._engine: TideEngine | None = None
        self._published: dict[tuple[str, str], float] = {}
        self._ray_metrics: dict[str, Any] = {}
        for metric in METRICS:
            tags = (JOB_TAG, *((metric.tag,) if metric.tag else ()))
            kind = Counter if metric.is_counter else Gauge
            made = kind(metric.name, description=metric.description, tag_keys=tags)
            self._ray_metrics[metric.name] = made.set_default_tags({JOB_TAG: job})
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tide-metrics", daemon=True)
        self._thread.start()

    def watch(self, engine: TideEngine) -> None:
        """Publish this engine from now on, whose counters start at zero. One watched before is read a last time."""
        self.publish()
        with self._lock:
            self._engine = engine
            self._published.clear()

    def forget(self) -> None:
        """Publish a last time what the engine has done, and hold it no longer."""
        self.publish()
        with self._lock:
            self._engine = None

    def publish(self) -> None:
        """Hand over what has changed. For the end of all work; meanwhile the thread does it."""
        with self._lock:
            if self._engine is None:
                return
            for metric in METRICS:
                values = metric.read(self._engine)
                for tag_value, value in values.items() if isinstance(values, Mapping) else [("", values)]:
                    self._hand_over(metric, tag_value, value)

    def close(self) -> None:
        """Publish a last time and end the thread."""
        self._stop.set()
        self._thread.join()
        self.publish()

    def _hand_over(self, metric: EngineMetric, tag_value: str, value: float) -> None:
        tags = {metric.tag: tag_value} if metric.tag else None
        if not metric.is_counter:
            self._ray_metrics[metric.name].set(value, tags=tags)
            return
        key = (metric.name, tag_value)
        if (added := value - self._published.get(key, 0)) > 0:
            self._ray_metrics[metric.name].inc(added, tags=tags)
            self._published[key] = value

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_SECONDS):
            self.publish()
