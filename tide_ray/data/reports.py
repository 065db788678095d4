"""What the actors report to the job: each keeps a file of its own in a place that all see, the job adds them up.

Files instead of an actor to report to: a Ray actor takes a process, which wakes a hundred times a second beside the
engines, and dies with its node.
"""

from __future__ import annotations

import json
import threading
import time
from copy import copy
from functools import cached_property
from typing import Any

from tide_ray.data.reading import TextFolder
from tide_ray.data.storage import join_attempt, replace_text, storage_path
from tide_ray.types import EngineStats, UserError

OF_ITS_NODE = ("device", "device_name", "num_threads", "max_num_seqs", "max_model_len", "num_kv_pages")
"""Facts of an engine that follow from the node that it runs on."""
TOTALS = ("started", "rows", "errors", "tokens", "depths")
COUNTERS = (
    "rows_through_layer", "num_prompt_tokens", "num_cached_tokens", "num_steps", "num_preemptions", "launches",
    "num_filled_rows", "num_prefill_exits", "num_dropped_tokens", "num_accepted_drafts", "num_rejected_drafts",
    "deferred_rows",
)  # fmt: skip


class Reporter:
    """One actor's report, rewritten whole at every change. May be used from several threads.

    Args:
        folder: made in the attempt's folder if need be; removed with it.
        name: unique among the processes of the job's actors.
        actor: Ray's id of the actor, which it keeps when its process is replaced; None: ``name``.
    """

    def __init__(self, folder: str, name: str, actor: str | None = None) -> None:
        self.folder = storage_path(folder, "output")
        self._path = self.folder / f"{name}.json"
        join_attempt(self.folder)
        self._report: dict[str, Any] = {"actor": actor or name, "totals": dict.fromkeys(TOTALS, 0)}
        self._lock = threading.RLock()

    def engine_started(self, facts: dict[str, Any], seconds: float, node: str | None = None) -> None:
        """``facts``: what the engine says of itself; ``seconds``: what loading it and warming it up took.

        ``node``: Ray's id of the node that it runs on.
        """
        self._write(engine=facts, process={"node": node, "startup_seconds": round(seconds, 3)})

    def engine_changed(self, facts: dict[str, Any]) -> None:
        """Another engine has taken the place of the one that started."""
        self._write(engine=facts)

    def rows_arrived(self, count: int) -> None:
        """``count`` rows are here. With the first, generating begins and starting up (Ray's, the engine's) is over."""
        with self._lock:
            totals = {**self._report["totals"], "started": self._report["totals"]["started"] + count}
            first = {} if "first_rows" in self._report else {"first_rows": time.time()}
            self._write(totals=totals, **first)

    def batch_done(
        self,
        totals: dict[str, int],
        counters: dict[str, Any],
        exits: dict[str, Any] | None,
        memory: dict[str, int],
        drift: dict[str, Any] | None = None,
    ) -> None:
        """Add one batch's ``totals``: all of TOTALS but ``started``.

        ``counters``, ``exits`` (the launch plan), ``memory`` (``peak_memory``) and ``drift`` (what the drift guard has
        found) are the engine's as they are now.
        """
        with self._lock:
            summed = {key: count + totals.get(key, 0) for key, count in self._report["totals"].items()}
            process = {**self._report.get("process", {}), **memory}
            now = {"counters": counters, "exits": exits, "process": process, "drift": drift, "last_batch": time.time()}
            self._write(totals=summed, **now)

    def failed(self, message: str, is_user_error: bool) -> None:
        """Why this actor cannot go on. The first failure is kept: later ones are its consequences."""
        if "failure" not in self._report:
            self._write(failure=[message, is_user_error], failed_at=time.time())

    def _write(self, **changes: Any) -> None:
        with self._lock:
            self._report |= changes
            replace_text(self._path, json.dumps(self._report))


class Reports:
    """All actors' reports as they are now. A batch that runs again after a death counts twice."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def totals(self) -> dict[str, Any]:
        """Sums of the actors' totals, engines that started, and seconds from the first rows to the last batch.

        ``started`` counts rows when an actor gets them, so that those of one that died count again.
        """
        reports = self._read()
        starts = [report["first_rows"] for report in reports if "first_rows" in report]
        ends = [report["last_batch"] for report in reports if "last_batch" in report]
        return {
            **{key: sum(report["totals"][key] for report in reports) for key in TOTALS},
            "engines": sum("engine" in report for report in reports),
            "seconds": max(max(ends) - min(starts), 0.0) if starts and ends else 0.0,
        }

    def failure(self) -> tuple[str, bool] | None:
        """Message of the first failure and whether it is a UserError."""
        failed = [report for report in self._read() if "failure" in report]
        if not failed:
            return None
        message, is_user_error = min(failed, key=lambda report: report["failed_at"])["failure"]
        return message, is_user_error

    def engines(self) -> list[dict[str, Any]]:
        """What each engine said of itself as it started."""
        return [report["engine"] for report in self._read() if "engine" in report]

    def engine_facts(self) -> dict[str, Any]:
        """Those of one engine. Others differ in OF_ITS_NODE, which ``processes`` has of each, and in costs."""
        return next(iter(self.engines()), {})

    def check_dtypes(self) -> None:
        """Refuse answers in several dtypes: ``auto`` takes what suits a device, and actors' devices may differ.

        Raises:
            UserError: the engines so far have several.
        """
        found = sorted({str(facts.get("dtype")) for facts in self.engines()})
        if len(found) > 1:
            raise UserError(
                f"dtype: auto is {' on some nodes, '.join(found)} on others; name one, or ask for like nodes by labels "
                "or accelerator_type"
            )

    def num_actors(self) -> int:
        """Actors whose engines started; one whose process was replaced counts once."""
        return len({report["actor"] for report in self._read() if "engine" in report})

    def final_exits(self) -> list[dict[str, Any]]:
        """What each engine's launch planner had come to at its last batch; empty without exits."""
        return self._of_each("exits")

    def drift(self) -> list[dict[str, Any]]:
        """What each actor's drift guard had found at its last batch; empty without."""
        return self._of_each("drift")

    def processes(self) -> list[dict[str, Any]]:
        """Of each actor's process: where it ran and with what, how long it took to start, its peak memory, its work."""
        return [
            {
                "actor": report["actor"],
                **report["process"],
                **{name: report["engine"].get(name) for name in OF_ITS_NODE},
                **{name: report["totals"][name] for name in ("rows", "tokens")},
            }
            for report in self._read()
            if "process" in report and "engine" in report
        ]

    def _of_each(self, what: str) -> list[dict[str, Any]]:
        """What each process reports under a name, with its actor, by which ``processes`` tells where it ran."""
        return [{"actor": report["actor"], **report[what]} for report in self._read() if report.get(what)]

    def counters(self) -> dict[str, Any]:
        """The engines' counters, summed."""
        summed: dict[str, Any] = {}
        for report in self._read():
            for key, value in report.get("counters", {}).items():
                summed[key] = _add(summed[key], value) if key in summed else value
        return summed

    @cached_property
    def _files(self) -> TextFolder:
        return TextFolder(storage_path(self.folder, "output"), "*.json")

    def _read(self) -> list[dict[str, Any]]:
        return [json.loads(text) for text in self._files.read()]


def engine_counters(stats: EngineStats) -> dict[str, Any]:
    """What a report has of an engine's counters."""
    by_depth = {str(depth): count for depth, count in sorted(dict(stats.tokens_at_depth).items())}
    return {**{name: copy(getattr(stats, name)) for name in COUNTERS}, "tokens_at_depth": by_depth}


def _add(a: Any, b: Any) -> Any:
    if isinstance(a, list):
        return [x + y for x, y in zip(a, b, strict=True)]
    if isinstance(a, dict):
        return {key: a.get(key, 0) + b.get(key, 0) for key in {**a, **b}}
    return a + b
