"""The ``tide-ray`` command: flags to a configuration, and errors to exit codes.

torch and ray are imported only when a job runs, so that help is instant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from tide_ray.cli import analytics, calibrate, generate, jobs, serve
from tide_ray.startup import end_quickly, quick_imports

app = typer.Typer(
    name="tide-ray",
    help="Distributed batch inference on Ray: prompts in, Parquet with a depth and a time for every token out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for part in (generate, jobs, analytics, calibrate, serve):
    app.add_typer(part.app)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from tide_ray import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Distributed batch inference on Ray: prompts in, Parquet with a depth and a time for every token out."""


@app.command()
def doctor() -> None:
    """Print what runs on this machine and why: versions, devices, and which kernels are on."""
    with quick_imports():
        from tide_ray.doctor import report

    for name, finding in report():
        typer.echo(f"{name:<12} {finding}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the console script, and of what stands for its commands in ``jobs``.

    Args:
        arguments: None for those of this process.
    """
    end_quickly()
    app(arguments)
