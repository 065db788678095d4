"""Progress of a job in a terminal, in a notebook and in a log."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import pytest
from rich.console import Console

from tide_ray.data import progress
from tide_ray.data.progress import Bar, JobProgress, Lines, PhaseLines, Standing, clock, display_for

TOTALS = {"engines": 1, "rows": 30, "errors": 0, "tokens": 3000, "depths": 84_000, "seconds": 0.0}


class Clock:
    """A clock that moves when told, for the module alone."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        patch.setattr(progress, "time", self)

    def monotonic(self) -> float:
        return self.now


def standing(**changes: Any) -> Standing:
    values = {"rows": 50, "total": 200, "rows_now": 30, "tokens": 3000, "depths": 84_000, "seconds": 60.0}
    return Standing(**{**values, **changes})


def test_the_time_left_is_that_of_the_rows_left_at_this_attempts_speed() -> None:
    assert standing().seconds_left == 150 * 60 / 30
    assert standing(rows_now=0).seconds_left is None
    assert standing(rows=200).seconds_left == 0
    assert standing().line() == "50 of 200 rows (25%), 50 tokens/s  depth 28.0, 1:00 elapsed, 5:00 left"
    assert standing(rows_now=0, tokens=0).line() == "50 of 200 rows (25%), 1:00 elapsed, ? left"
    assert json.dumps(standing().facts())
    assert [clock(s) for s in (None, 0.4, 59.6, 3599, 3600, 86_399)] == [
        "?", "0:00", "1:00", "59:59", "1:00:00", "23:59:59",
    ]  # fmt: skip


def test_a_job_counts_from_when_its_engines_are_up_and_rows_of_an_earlier_attempt_are_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    shown: list[str] = []
    totals = {**TOTALS, "engines": 0, "rows": 0}
    job = JobProgress(Lines(lambda text, _: shown.append(text)), total=200, done=20, read=lambda: totals)
    assert job.standing() is None, "still loading"
    totals |= {"engines": 1}
    clock.now += 500
    assert job.standing().seconds == 0
    clock.now += 60
    totals |= {"rows": 30}
    now = job.standing()
    assert (now.rows, now.rows_now, now.seconds, now.seconds_left) == (50, 30, 60, 300)
    totals |= {"rows": 190}
    assert job.standing().rows == 200, "a batch that ran twice is one batch of the job's"


def test_a_short_job_whose_rows_are_done_when_it_is_first_seen_has_the_speed_that_it_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A job of 16 rows began with "60,821,041 tokens/s": all its tokens in the time since the driver had looked."""
    clock = Clock(monkeypatch)
    totals = {**TOTALS, "seconds": 1.5}
    job = JobProgress(Lines(lambda _text, _facts: None), total=30, done=0, read=lambda: totals)
    assert job.standing().tokens_per_second == 2000
    clock.now += 0.5
    assert job.standing().seconds == 2


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, lines = Clock(monkeypatch), []
    display = Lines(lambda text, facts: lines.append((text, facts)), every=30)
    display.start()
    display.show(None)
    for _ in range(65):
        display.show(standing())
        clock.now += 1
    display.show(standing(rows=200), is_last=True)
    texts = [text for text, _ in lines]
    assert texts[0] == "starting engines"
    assert len(texts) == 1 + 3 + 1
    assert texts[-1].startswith("200 of 200 rows (100%)")
    assert lines[-1][1]["rows"] == 200


def written(display_of: Console) -> str:
    file = display_of.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_terminal_gets_a_bar_with_the_time_left() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    display = display_for(console, total=200, done=20)
    assert isinstance(display, Bar)
    display.start()
    display.show(standing())
    display.stop()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written(console))
    assert "generating" in plain
    assert "50/200" in plain
    assert "50 tokens/s  depth 28.0" in plain
    assert "5:00 left" in plain


@pytest.mark.parametrize("has_widgets", [True, False])
def test_a_notebook_gets_a_bar_where_it_has_widgets_and_lines_else(
    has_widgets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """rich without ipywidgets appends a new bar to the output for every refresh."""
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda _name: object() if has_widgets else None)
    display = display_for(Console(file=io.StringIO(), force_jupyter=True), total=200, done=20)
    assert isinstance(display, Bar if has_widgets else Lines)


def test_a_file_gets_lines_and_a_structured_log_gets_facts() -> None:
    console = Console(file=io.StringIO(), width=60)
    display = display_for(console, total=200, done=20)
    display.start()
    display.show(standing())
    assert written(console).splitlines()[0] == "starting engines"
    assert " ".join(written(console).split()).endswith("50 tokens/s depth 28.0, 1:00 elapsed, 5:00 left")
    records: list[dict[str, Any]] = []
    display_for(console, total=200, done=20, log=lambda _text, facts: records.append(facts)).show(standing())
    assert records[0]["seconds_left"] == 300


def test_a_log_of_phases_has_each_of_them_and_the_time_left_in_long_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, console = Clock(monkeypatch), Console(file=io.StringIO(), width=120)
    show = PhaseLines(console, every=30)
    show("loading the model", 0.0)
    for second in range(61):
        show("answering", second / 120)
        clock.now += 1
    assert written(console).splitlines() == [
        "loading the model", "answering", "answering: 25%, 1:30 left", "answering: 50%, 1:00 left",
    ]  # fmt: skip


def test_a_cluster_that_goes_down_is_told_once_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0.01)
    lines: list[str] = []

    def read() -> dict[str, Any]:
        raise ConnectionError

    with JobProgress(Lines(lambda text, _: lines.append(text)), total=2, done=0, read=read) as job:
        job._thread.join(timeout=10)
        monkeypatch.setattr(job, "_read", lambda: TOTALS)  # or the end would raise what the job itself would
    assert lines[:2] == ["starting engines", "no report: ConnectionError"]
