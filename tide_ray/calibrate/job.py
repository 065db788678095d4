"""The calibration command: progress with the time left, then the table."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tide_ray.calibrate.calibrate import calibrate
from tide_ray.calibrate.config import CalibrationConfig
from tide_ray.calibrate.report import print_report
from tide_ray.exits.checkpoint import Routers

LOG_WIDTH = 120


def run_calibrate(config: CalibrationConfig, console: Console | None = None) -> Routers:
    """Calibrate, showing what is being done; returns the saved routers.

    Raises:
        UserError: something in ``config`` cannot be used.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:  # a log file has no width, and the table needs some
        console = Console(stderr=True, width=LOG_WIDTH)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=console, refresh_per_second=1) as progress:
        tasks: dict[str, TaskID] = {}

        def show(what: str, share: float) -> None:
            if what not in tasks:
                for task in tasks.values():
                    progress.update(task, completed=1.0)
                tasks[what] = progress.add_task(what, total=1.0)
            progress.update(tasks[what], completed=share)

        routers = calibrate(config, show)
        for task in tasks.values():
            progress.update(task, completed=1.0)
    print_report(console, routers, config.output)
    return routers
