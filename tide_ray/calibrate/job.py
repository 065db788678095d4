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
from tide_ray.calibrate.report import print_certificates, print_evaluation, print_report
from tide_ray.exits.checkpoint import Routers
from tide_ray.types import UserError

LOG_WIDTH = 120


def run_calibrate(config: CalibrationConfig, console: Console | None = None) -> Routers:
    """Calibrate, showing what is being done; returns the saved routers.

    Raises:
        UserError: something in ``config`` cannot be used.
    """
    console = _readable(console)
    with _shown(console) as show:
        routers = calibrate(config, show)
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
    print_certificates(console, certification, config.routers)
    return certification


def run_evaluate(config: EvaluationConfig, console: Console | None = None) -> dict[str, Any]:
    """Evaluate, showing what is being done; the figures are in ``config.output`` then, where it names a file.

    Raises:
        UserError: something in ``config`` cannot be used.
    """
    console = _readable(console)
    if config.output is not None and (Path(config.output).is_dir() or not Path(config.output).parent.is_dir()):
        raise UserError(f"output must be a file in a folder that exists, got {config.output!r}")
    with _shown(console) as show:
        facts = evaluate(config, show)
    print_evaluation(console, facts)
    if config.output is not None:
        Path(config.output).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


def _readable(console: Console | None) -> Console:
    console = console or Console(stderr=True)
    # A log file has no width, and the tables need some.
    return console if console.is_terminal else Console(stderr=True, width=LOG_WIDTH)


@contextmanager
def _shown(console: Console) -> Iterator[Show]:
    """A bar for each thing that is done, from its name and its share done."""
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
