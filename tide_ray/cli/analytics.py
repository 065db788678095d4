"""``query`` and ``report``: what the outputs of jobs say."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from tide_ray.cli.errors import errors_as_exit_codes

app = typer.Typer()

MemoryLimit = Annotated[str, typer.Option(help="what DuckDB may hold before it spills to a temporary folder")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: all cores")]


@app.command()
def query(
    outputs: Annotated[
        list[str], typer.Argument(metavar="OUTPUT... SQL", help="output folders or globs, then a SELECT")
    ],
    format_: Annotated[
        str | None, typer.Option("--format", help="table, csv, json (an object a line) or parquet")
    ] = None,
    output: Annotated[str | None, typer.Option(help="file to write; its name tells the format")] = None,
    memory_limit: MemoryLimit = "2GB",
    threads: Threads = None,
) -> None:
    """Ask the output of jobs in SQL: one SELECT over the views rows, tokens, errors and run."""
    with errors_as_exit_codes():
        from tide_ray.types import UserError

        if len(outputs) < 2:
            raise UserError(f"query takes output folders and then a SELECT, got only {outputs[0]!r}")
        *folders, sql = outputs

        from tide_ray.analytics import load
        from tide_ray.analytics.export import WRITERS, choose_format, whole_file

        write = WRITERS[choose_format(format_, output)]
        with load(folders, memory_limit=memory_limit, threads=threads) as analytics, analytics.batches(sql) as reader:
            for note in analytics.notes:
                typer.echo(f"note: {note}", err=True)
            if output is not None:
                with whole_file(output) as stream:
                    write(reader, stream)
                return
            try:
                write(reader, sys.stdout.buffer)
                sys.stdout.flush()
            except BrokenPipeError:  # whoever reads has enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@app.command()
def report(
    outputs: Annotated[list[str], typer.Argument(help="output folders or globs; each is compared with the first")],
    output: Annotated[str, typer.Option(help="the page to write")] = "tide-report.html",
    category: Annotated[
        list[str] | None,
        typer.Option(help="column kept from the input to tell depths by; default: those of few values"),
    ] = None,
    memory_limit: MemoryLimit = "2GB",
    threads: Threads = None,
) -> None:
    """Say what the output of a job tells, or how jobs differ: a summary here, and a page of one file with figures."""
    with errors_as_exit_codes():
        from rich.console import Console

        from tide_ray.analytics import load
        from tide_ray.analytics.report import make_report, print_report, write_report

        with load(outputs, memory_limit=memory_limit, threads=threads) as analytics:
            made = make_report(analytics, category)
        console = Console()
        print_report(console, made)
        console.print(f"written to {write_report(output, made)}", markup=False, highlight=False)
