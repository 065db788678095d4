"""Commands about the output folder of a job: ``status``, ``verify`` and ``compact``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from tide_ray.cli.errors import EXIT_FAILED, errors_as_exit_codes

app = typer.Typer()

OutputFolder = Annotated[str, typer.Argument(help="output folder of a generation job")]
AsJson = Annotated[bool, typer.Option("--json", help="one line of JSON in place of text")]


@app.command()
def status(output: OutputFolder, as_json: AsJson = False) -> None:
    """Say how far a job is: rows done, rejected and left, who is at it, and how fast."""
    with errors_as_exit_codes():
        from tide_ray.data.status import job_status, status_lines

        found = job_status(output)
        typer.echo(json.dumps(found) if as_json else "\n".join(status_lines(found)))


@app.command()
def verify(output: OutputFolder, as_json: AsJson = False) -> None:
    """Check a job's output: no row missing or twice, schema, and every part as it was written.

    Exit codes: 0 nothing wrong, 1 problems, each in a line, 2 no such job.
    """
    with errors_as_exit_codes():
        from dataclasses import asdict

        from tide_ray.data.verify import verify_job

        found = verify_job(output)
        if as_json:
            typer.echo(json.dumps(asdict(found)))
        else:
            for problem in found.problems:
                typer.echo(f"problem: {problem}")
            state = "finished" if found.is_finished else f"unfinished, {found.num_left} rows left"
            typer.echo(
                f"{'failed' if found.problems else 'ok'}: {found.num_results} rows and {found.num_errors} errors of "
                f"{found.num_expected} in {found.num_parts} parts; {state}"
            )
        if found.problems:
            raise typer.Exit(EXIT_FAILED)


@app.command()
def compact(
    output: OutputFolder,
    file_mib: Annotated[int, typer.Option(help="size of the files to make, in MiB", min=1)] = 256,
) -> None:
    """Merge a finished job's parts into few large files, with the same rows, for whoever analyses them."""
    with errors_as_exit_codes():
        from tide_ray.data.compact_job import compact_job

        for kind, (before, after) in compact_job(output, file_bytes=file_mib << 20).items():
            typer.echo(f"{kind}: {before} parts before, {after} now")
