"""How the job shows what its actors have done: a bar that looks at their reports."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

REFRESH_SECONDS = 1.0


class ProgressBar:
    """Shows rows, tokens/s and mean depth until the block ends. ``read`` returns ``Reports.totals``."""

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
