"""The commands on router checkpoints: progress with the time left, then the table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tide_ray.calibrate.calibrate import calibrate
from tide_ray.calibrate.certify import Certification, certify
from tide_ray.calibrate.config import CalibrationConfig, CertificationConfig, EvaluationConfig
from tide_ray.calibrate.corpus import Progress as Show
from tide_ray.calibrate.evaluate import evaluate
from tide_ray.calibrate.pages import write_evaluation_page, write_report
from tide_ray.calibrate.report import print_certificates, print_evaluation, print_report
from tide_ray.data.progress import PhaseLines, can_redraw
from tide_ray.exits.checkpoint import Routers
from tide_ray.types import UserError

LOG_WIDTH = 120
PAGE_SUFFIX = ".html"


def run_calibrate(config: CalibrationConfig, console: Console | None = None) -> Routers:
    """Calibrate, showing what is being done; returns the saved routers, which have a ``report.html`` beside them.

    Raises:
        UserError: something in ``config`` cannot be used.
    """
    console = _readable(console)
    with _shown(console) as show:
        routers = calibrate(config, show)
    write_report(config.output)
    print_report(console, routers, config.output)
    return routers


def run_certify(config: CertificationConfig, console: Console | None = None) -> Certification:
    """Certify, showing what is being done; the certificates are in the checkpoint then.

    Raises:
        UserError: something in ``config`` cannot be used.
    """
    console = _readable(console)
    with _shown(console) as show:
        certification = certify(config, show)
    write_report(config.routers)
    print_certificates(console, certification, config.routers)
    return certification


def run_evaluate(config: EvaluationConfig, console: Console | None = None) -> dict[str, Any]:
    """Evaluate, showing what is being done; the figures are in ``config.output`` then, where it names a file, and
    their table and plot in a page of the same name.

    Raises:
        UserError: something in ``config`` cannot be used.
    """
    console = _readable(console)
    if config.output is not None:
        output = Path(config.output)
        if output.is_dir() or not output.parent.is_dir():
            raise UserError(f"output must be a file in a folder that exists, got {config.output!r}")
        if output.suffix == PAGE_SUFFIX:
            raise UserError(f"output is for JSON, its page lies beside it, got {config.output!r}")
    with _shown(console) as show:
        facts = evaluate(config, show)
    print_evaluation(console, facts)
    if config.output is not None:
        Path(config.output).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        page = write_evaluation_page(Path(config.output).with_suffix(PAGE_SUFFIX), facts)
        console.print(f"written to {config.output} and {page}")
    return facts


def _readable(console: Console | None) -> Console:
    console = console or Console(stderr=True)
    # A log file has no width, and the tables need some.
    return console if console.is_terminal else Console(stderr=True, width=LOG_WIDTH)


@contextmanager
def _shown(console: Console) -> Iterator[Show]:
    """A bar for each thing that is done, from its name and its share done; lines where bars cannot move."""
    if not can_redraw(console):
        yield PhaseLines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=console, refresh_per_second=1) as progress:
        tasks: dict[str, TaskID] = {}

        def show(what: str, share: float) -> None:
            if what not in tasks:
                for task in tasks.values():
                    progress.update(task, completed=1.0)
                tasks[what] = progress.add_task(what, total=1.0)
            progress.update(tasks[what], completed=share)

        yield show
        for task in tasks.values():
            progress.update(task, completed=1.0)
