"""Commands of ``benchmark.py`` about whole systems: server, jobs under faults, scale, analyses of the output."""

from __future__ import annotations

from typing import Annotated

import typer
from bench_options import (
    AnswerTokens,
    Dtype,
    Model,
    NumThreads,
    Output,
    Prompts,
    Rounds,
    finish,
    parse_numbers,
    parse_positive,
    user_errors,
    workload_from,
)

app = typer.Typer()


@app.command()
def serving(
    prompts: Prompts = None,
    model: Model = "demo",
    dtype: Dtype = "auto",
    max_tokens: AnswerTokens = 128,
    concurrency: Annotated[int, typer.Option(help="streams at a time")] = 64,
    seconds: Annotated[int, typer.Option(help="how long they are kept up")] = 120,
    rounds: Rounds = 3,
    overload: Annotated[int, typer.Option(help="times as many streams come afterwards; 0: none", min=0)] = 10,
    overload_seconds: Annotated[int, typer.Option(help="how long those come")] = 20,
    max_num_seqs: Annotated[int, typer.Option(help="resident sequences")] = 64,
    num_threads: NumThreads = None,
    exits: Annotated[str | None, typer.Option(help="folder of a router checkpoint")] = None,
    stream_interval_ms: Annotated[
        float | None, typer.Option(help="least time between two chunks of a stream; default: the server's", min=0)
    ] = None,
    output: Output = None,
) -> None:
    """The server under load from Locust, beside the bare engine with as many prompts at a time."""
    with user_errors():
        from bench_machine import machine_facts, num_cores
        from bench_report import print_serving_report
        from bench_serving import run_serving

        machine = machine_facts(num_threads or num_cores())
        measured = run_serving(
            workload_from(
                prompts,
                None,
                0,
                limit=None,
                model=model,
                dtype=dtype,
                max_tokens=parse_positive("max_tokens", max_tokens),
            ),
            concurrency=parse_positive("concurrency", concurrency),
            seconds=parse_positive("seconds", seconds),
            rounds=rounds,
            overload=overload,
            overload_seconds=parse_positive("overload_seconds", overload_seconds),
            num_threads=machine["num_threads"],
            max_num_seqs=parse_positive("max_num_seqs", max_num_seqs),
            exits=exits,
            stream_interval_ms=stream_interval_ms,
        )
    finish("serving", machine, measured, print_serving_report, output)


@app.command()
def faults(
    scenarios: Annotated[str, typer.Option(help="names, separated by commas; default: all")] = "",
    rows: Annotated[int, typer.Option(help="prompts of each job")] = 240,
    finished_rows: Annotated[int, typer.Option(help="prompts of the job that is run again when it is finished")] = 2000,
    model: Model = "demo",
    dtype: Dtype = "auto",
    max_tokens: AnswerTokens = 48,
    max_num_seqs: Annotated[int, typer.Option(help="resident sequences of an actor")] = 8,
    output: Output = None,
) -> None:
    """Jobs whose processes are killed, starved and stopped: rows lost, doubled and generated again."""
    with user_errors():
        from bench_faults import print_faults_report, run_faults
        from bench_machine import machine_facts, num_cores

        machine = machine_facts(num_cores())
        measured = run_faults(
            [name for name in scenarios.split(",") if name],
            num_rows=parse_positive("rows", rows),
            finished_rows=parse_positive("finished_rows", finished_rows),
            model=model,
            dtype=dtype,
            max_tokens=parse_positive("max_tokens", max_tokens),
            max_num_seqs=parse_positive("max_num_seqs", max_num_seqs),
        )
    finish("faults", machine, measured, print_faults_report, output)
    if any("failed" in row for row in measured["scenarios"]):
        raise typer.Exit(1)


@app.command()
def scale(
    prompts: Prompts = None,
    model: Model = "demo",
    dtype: Dtype = "auto",
    max_tokens: AnswerTokens = 64,
    actor_rows: Annotated[int, typer.Option(help="rows of each job of one and of two actors")] = 512,
    max_num_seqs: Annotated[int, typer.Option(help="resident sequences of an actor")] = 32,
    rounds: Annotated[int, typer.Option(help="times that one and two actors run; 0: leave them out", min=0)] = 3,
    memory_rows: Annotated[
        str, typer.Option(help="rows of the jobs whose driver is weighed, ascending, or nothing")
    ] = "10000,100000",
    output: Output = None,
) -> None:
    """Two actors against one, and the driver's peak memory against the number of rows."""
    with user_errors():
        from tide_ray.types import UserError

        row_counts = parse_numbers("memory_rows", memory_rows) if memory_rows else []
        if row_counts != sorted(set(row_counts)):
            raise UserError(f"memory_rows must be ascending, got {memory_rows!r}")

        from bench_machine import machine_facts
        from bench_scale import print_scale_report, run_scale
        from bench_workload import Workload

        parse_positive("max_tokens", max_tokens)
        machine = machine_facts(1)
        measured = run_scale(
            Workload.read(prompts or [], model=model, dtype=dtype, max_tokens=max_tokens) if rounds else None,
            actor_rows=parse_positive("actor_rows", actor_rows),
            max_num_seqs=parse_positive("max_num_seqs", max_num_seqs),
            rounds=rounds,
            memory_rows=row_counts,
        )
    finish("scale", machine, measured, print_scale_report, output)


@app.command()
def analytics(
    tokens: Annotated[str, typer.Option(help="sizes of the outputs, separated by commas")] = "1000000,100000000",
    model: Annotated[str, typer.Option(help="whose tokenizer gives the texts")] = "demo",
    memory_limit: Annotated[str, typer.Option(help="what DuckDB may hold")] = "2GB",
    num_threads: NumThreads = None,
    output: Output = None,
) -> None:
    """Time and peak memory of queries and of the report, on made-up outputs."""
    with user_errors():
        from bench_analytics import print_analytics_report, run_analytics
        from bench_machine import machine_facts, num_cores

        machine = machine_facts(parse_positive("num_threads", num_cores() if num_threads is None else num_threads))
        measured = run_analytics(
            parse_numbers("tokens", tokens), memory_limit=memory_limit, threads=machine["num_threads"], model=model
        )
    finish("analytics", machine, measured, print_analytics_report, output)
