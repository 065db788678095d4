"""What the actors report, and how the job shows it: a board that adds up, and a bar that looks at the board."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

REFRESH_SECONDS = 1.0


class Board:
    """Sums over all actors; the job runs one as a Ray actor. A batch that runs again after a death counts twice."""

    def __init__(self) -> None:
        self._totals = {"rows": 0, "errors": 0, "tokens": 0, "depths": 0}
        self._first_start: float | None = None
        self._last_batch: float | None = None
        self._engines: dict[str, dict[str, Any]] = {}
        self._counters: dict[str, dict[str, Any]] = {}
        self._failure: tuple[str, bool] | None = None

    def engine_started(self, name: str, facts: dict[str, Any]) -> None:
        self._engines[name] = facts

    def rows_arrived(self) -> None:
        """An actor got its first rows: generating begins, and starting up (Ray's and the engine's) is over."""
        self._first_start = self._first_start or time.perf_counter()

    def batch_done(self, name: str, totals: dict[str, int], counters: dict[str, Any]) -> None:
        """Add one batch's totals; ``counters`` are the engine's own since its start and replace those before."""
        for key, value in totals.items():
            self._totals[key] += value
        self._counters[name] = counters
        self._last_batch = time.perf_counter()

    def failed(self, message: str, is_user_error: bool) -> None:
        """The first failure is kept: later ones are its consequences."""
        self._failure = self._failure or (message, is_user_error)

    def totals(self) -> dict[str, Any]:
        """Sums of the batches' totals, engines that started, and seconds from the first rows to the last batch."""
        seconds = (self._last_batch or 0.0) - (self._first_start or 0.0)
        return {**self._totals, "engines": len(self._engines), "seconds": max(seconds, 0.0)}

    def failure(self) -> tuple[str, bool] | None:
        """Message of the first failure and whether it is a UserError."""
        return self._failure

    def engine_facts(self) -> dict[str, Any]:
        """What the first engine said of itself; all engines of a job are alike."""
        return next(iter(self._engines.values()), {})

    def counters(self) -> dict[str, Any]:
        """The engines' counters, summed."""
        summed: dict[str, Any] = {}
        for counters in self._counters.values():
            for key, value in counters.items():
                summed[key] = _add(summed[key], value) if key in summed else value
        return summed


def _add(a: Any, b: Any) -> Any:
    if isinstance(a, list):
        return [x + y for x, y in zip(a, b, strict=True)]
    if isinstance(a, dict):
        return {key: a.get(key, 0) + b.get(key, 0) for key in {**a, **b}}
    return a + b


class ProgressBar:
    """Shows rows, tokens/s and mean depth until the block ends. ``read`` returns the board's totals."""

    def __init__(self, console: Console, *, total: int, done: int, read: Callable[[], dict[str, Any]]) -> None:
        self._read = read
        self._total = total
        self._done = done
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            console=console,
            refresh_per_second=1 / REFRESH_SECONDS,  # drawing more often takes cores from the engines
        )
        self._task = self._progress.add_task("starting engines", total=total, completed=done, speed="")

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if kind is None:
            self.show(self._read())
        self._progress.stop()

    def _watch(self) -> None:
        while not self._stop.wait(REFRESH_SECONDS):
            try:
                self.show(self._read())
            except Exception as error:  # the cluster may be going down; whoever runs the job says so, once
                self._progress.update(self._task, description=f"no report: {type(error).__name__}")
                return

    def show(self, totals: dict[str, Any]) -> None:
        """Draw ``totals``."""
        task = self._progress.tasks[0]
        if not totals["engines"]:
            return
        if task.description == "starting engines":
            # Speed counts from here: loading the model is not generating.
            self._progress.reset(self._task, description="generating", completed=self._done)
        speed = ""
        if totals["tokens"] and task.elapsed:
            depth = totals["depths"] / totals["tokens"]
            speed = f"{totals['tokens'] / task.elapsed:,.0f} tokens/s  depth {depth:.1f}"
        self._progress.update(self._task, completed=min(self._done + totals["rows"], self._total), speed=speed)
