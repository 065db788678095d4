"""How a job shows what its actors have done: a bar in a terminal or a notebook, lines in a log."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

REFRESH_SECONDS = 1.0
LINE_SECONDS = 30.0
STARTING = "starting engines"
WriteLine = Callable[[str, dict[str, Any]], None]
"""Takes a line, and the facts in it."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a job is. ``seconds``: since its engines were up, or had their first rows where that was seen late; loading
    a model is not generating."""

    rows: int
    total: int
    rows_now: int
    """Of ``rows``, those of this attempt, which tell how fast it is."""
    tokens: int
    depths: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def mean_depth(self) -> float:
        return self.depths / self.tokens if self.tokens else 0.0

    @property
    def seconds_left(self) -> float | None:
        """None while no row is done."""
        return (self.total - self.rows) * self.seconds / self.rows_now if self.rows_now else None

    @property
    def speed(self) -> str:
        """Tokens/s and depth, or "" before there is any."""
        return f"{self.tokens_per_second:,.0f} tokens/s  depth {self.mean_depth:.1f}" if self.tokens else ""

    def line(self) -> str:
        """All of it in one line of a log."""
        parts = [f"{self.rows:,} of {self.total:,} rows ({self.rows / self.total:.0%})" if self.total else "0 rows"]
        parts += [self.speed] if self.speed else []
        return ", ".join([*parts, f"{clock(self.seconds)} elapsed", f"{clock(self.seconds_left)} left"])

    def facts(self) -> dict[str, Any]:
        """All of it for a structured log."""
        left = self.seconds_left
        return {
            "rows": self.rows,
            "total_rows": self.total,
            "tokens": self.tokens,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "mean_depth": round(self.mean_depth, 2),
            "seconds": round(self.seconds, 1),
            "seconds_left": None if left is None else round(left, 1),
        }


class Display(Protocol):
    """Shows a standing, None while the engines start."""

    def start(self) -> None: ...
    def show(self, standing: Standing | None, *, is_last: bool = False) -> None: ...
    def say(self, text: str) -> None: ...
    def stop(self) -> None: ...


class JobProgress:
    """Shows rows, speed, depth and the time left until the block ends.

    Args:
        total, done: rows of the job, and those that an earlier attempt has left.
        read: returns ``Reports.totals``.
    """

    def __init__(self, display: Display, *, total: int, done: int, read: Callable[[], Mapping[str, Any]]) -> None:
        self._display = display
        self._total = total
        self._done = done
        self._read = read
        self._started: float | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> JobProgress:
        self._display.start()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if kind is None:
            self._display.show(self.standing(), is_last=True)
        self._display.stop()

    def standing(self) -> Standing | None:
        """As it is now."""
        totals = self._read()
        if not totals["engines"]:
            return None
        if self._started is None:  # it may be seen late: a short job's rows are done by then
            self._started = time.monotonic() - totals["seconds"]
        rows_now = min(totals["rows"], self._total - self._done)  # a batch that ran twice counts twice
        seconds = time.monotonic() - self._started
        return Standing(self._done + rows_now, self._total, rows_now, totals["tokens"], totals["depths"], seconds)

    def _watch(self) -> None:
        while not self._stop.wait(REFRESH_SECONDS):
            try:
                self._display.show(self.standing())
            except Exception as error:  # the cluster may be going down; whoever runs the job says so, once
                self._display.say(f"no report: {type(error).__name__}")
                return


class Bar:
    """For eyes: a terminal, or a notebook that has widgets."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            refresh_per_second=1 / REFRESH_SECONDS,  # drawing more often takes cores from the engines
        )
        self._task = self._progress.add_task(STARTING, total=total, completed=done, speed="", left="")

    def start(self) -> None:
        self._progress.start()

    def show(self, standing: Standing | None, *, is_last: bool = False) -> None:
        if standing is None:
            return
        if self._progress.tasks[0].description == STARTING:
            self._progress.reset(self._task, description="generating")
        left = "" if is_last else f"{clock(standing.seconds_left)} left"
        self._progress.update(self._task, completed=standing.rows, speed=standing.speed, left=left)

    def say(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def stop(self) -> None:
        self._progress.stop()


class Lines:
    """For files: a line as the engines start and as they are up, now and then one in between, and one at the end."""

    def __init__(self, write: WriteLine, every: float = LINE_SECONDS) -> None:
        self._write = write
        self._every = every
        self._last: float | None = None

    def start(self) -> None:
        self._write(STARTING, {})

    def show(self, standing: Standing | None, *, is_last: bool = False) -> None:
        now = time.monotonic()
        is_due = self._last is None or now - self._last >= self._every
        if standing is not None and (is_due or is_last):
            self._last = now
            self._write(standing.line(), standing.facts())

    def say(self, text: str) -> None:
        self._write(text, {})

    def stop(self) -> None:
        pass


def display_for(console: Console, *, total: int, done: int, log: WriteLine | None = None) -> Display:
    """What suits where ``console`` writes to. ``log``: takes structured lines instead of it."""
    if log is not None:
        return Lines(log)
    if can_redraw(console):
        return Bar(console, total, done)
    return Lines(lambda text, _facts: console.print(text, markup=False, highlight=False))


def can_redraw(console: Console) -> bool:
    """Whether bars can move there: in a terminal, and in a notebook that has widgets.

    Without widgets rich can only append to a notebook's output, a bar for every refresh.
    """
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal


class PhaseLines:
    """For files: a line for each thing that is done, and now and then its share and the time left."""

    def __init__(self, console: Console, every: float = LINE_SECONDS) -> None:
        self._console = console
        self._every = every
        self._what = ""
        self._started = self._last = 0.0

    def __call__(self, what: str, share: float) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._started, self._last = what, now, now
            self._print(what)
        elif share > 0 and now - self._last >= self._every:
            self._last = now
            self._print(f"{what}: {share:.0%}, {clock((now - self._started) * (1 - share) / share)} left")

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)


def clock(seconds: float | None) -> str:
    """``h:mm:ss``, or ``m:ss`` within an hour; "?" for what is not known."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
