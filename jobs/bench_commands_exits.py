"""Commands of ``benchmark.py`` about exits: mechanics, real checkpoints, quality, calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from bench_options import (
    AnswerTokens,
    Checkpoint,
    Dtype,
    FewShot,
    Limit,
    MinSeconds,
    Model,
    NumThreads,
    Output,
    Prompts,
    Rounds,
    ShapeOrModel,
    Shots,
    finish,
    parse_numbers,
    parse_positive,
    parse_shares,
    user_errors,
    workload_from,
)

app = typer.Typer()


@app.command()
def depth(
    scenarios: Annotated[
        str, typer.Option(help="DEPTH:SHARE of tokens made to exit there, separated by commas")
    ] = "15:0.5,24:0.3",
    residents: Annotated[str, typer.Option(help="resident sequences, separated by commas")] = "1,8,32,64,128,256",
    model: ShapeOrModel = "demo",
    dtype: Dtype = "auto",
    rounds: Rounds = 3,
    tokens: Annotated[int, typer.Option(help="tokens per resident in each run")] = 24,
    prompt_tokens: Annotated[str, typer.Option(help="tokens of each prompt, separated by commas")] = "64",
    min_seconds: MinSeconds = 4.0,
    num_threads: NumThreads = None,
    output: Output = None,
) -> None:
    """Forced exits under several launch policies against full depth at the same residents, beside their limits."""
    with user_errors():
        for name, value in (("rounds", rounds), ("tokens", tokens), ("num_threads", num_threads)):
            if value is not None:
                parse_positive(name, value)
        counts = parse_numbers("residents", residents)
        contexts = parse_numbers("prompt_tokens", prompt_tokens)

        from bench_depth import Scenario, run_depth
        from bench_machine import machine_facts, num_cores
        from bench_report import print_depth_report

        machine = machine_facts(num_threads or num_cores())
        measured = run_depth(
            model=model,
            dtype=dtype,
            scenarios=[Scenario.parse(text) for text in scenarios.split(",")],
            residents=counts,
            rounds=rounds,
            tokens=tokens,
            min_seconds=min_seconds,
            num_threads=machine["num_threads"],
            prompt_tokens=contexts,
        )
    finish("depth", machine, measured, print_depth_report, output)


@app.command()
def exits(
    checkpoint: Checkpoint,
    prompts: Prompts = None,
    errors: Annotated[str, typer.Option(help="calibrated error levels, separated by commas")] = "0.01,0.05",
    prefill_shares: Annotated[str, typer.Option(help="shares of prompt tokens that stop, or nothing")] = "",
    residents: Annotated[str, typer.Option(help="also decode with exactly these many residents")] = "",
    few_shot: FewShot = None,
    shots: Shots = 8,
    model: Model = "demo",
    dtype: Dtype = "auto",
    max_tokens: AnswerTokens = 128,
    max_num_seqs: Annotated[int, typer.Option(help="resident sequences")] = 64,
    rounds: Rounds = 3,
    min_seconds: MinSeconds = 4.0,
    num_threads: NumThreads = None,
    limit: Limit = None,
    output: Output = None,
) -> None:
    """A router checkpoint against full depth: speed, agreement with full depth, and their limits."""
    with user_errors():
        from bench_exits import run_exits
        from bench_machine import machine_facts, num_cores
        from bench_report import print_exits_report

        machine = machine_facts(num_threads or num_cores())
        measured = run_exits(
            workload_from(prompts, few_shot, shots, model=model, dtype=dtype, max_tokens=max_tokens, limit=limit),
            checkpoint,
            errors=parse_shares("errors", errors),
            prefill_shares=parse_shares("prefill_shares", prefill_shares),
            residents=parse_numbers("residents", residents) if residents else [],
            rounds=parse_positive("rounds", rounds),
            min_seconds=min_seconds,
            num_threads=machine["num_threads"],
            max_num_seqs=parse_positive("max_num_seqs", max_num_seqs),
        )
    finish("exits", machine, measured, print_exits_report, output)


@app.command()
def verified(
    checkpoint: Checkpoint,
    prompts: Prompts = None,
    exit_error: Annotated[float, typer.Option(help="calibrated error level that decides who drafts")] = 0.02,
    residents: Annotated[str, typer.Option(help="prompts at once, separated by commas")] = "1,8,32,64",
    model: Model = "demo",
    dtype: Dtype = "auto",
    max_tokens: AnswerTokens = 128,
    rounds: Rounds = 5,
    num_threads: NumThreads = None,
    limit: Limit = None,
    output: Output = None,
) -> None:
    """Mode verified against full depth: the same answers, and the time they take."""
    with user_errors():
        from bench_machine import machine_facts, num_cores
        from bench_report import print_verified_report
        from bench_verified import run_verified

        machine = machine_facts(num_threads or num_cores())
        measured = run_verified(
            workload_from(prompts, None, 0, model=model, dtype=dtype, max_tokens=max_tokens, limit=limit),
            checkpoint,
            exit_error=exit_error,
            residents=parse_numbers("residents", residents),
            rounds=parse_positive("rounds", rounds),
            num_threads=machine["num_threads"],
        )
    finish("verified", machine, measured, print_verified_report, output)


@app.command()
def certified(
    checkpoint: Checkpoint,
    prompts: Annotated[list[str] | None, typer.Option(help="prompts that the checkpoint has not seen")] = None,
    skip: Annotated[int, typer.Option(help="leave out this many of them at the start")] = 0,
    exit_errors: Annotated[str, typer.Option(help="also thresholds calibrated for these errors, or nothing")] = "",
    baselines: Annotated[bool, typer.Option(help="also fixed sets of layers")] = True,
    max_tokens: AnswerTokens = 128,
    num_threads: NumThreads = None,
    limit: Limit = None,
    output: Output = None,
) -> None:
    """``tide-ray evaluate``, with the certification's own figures and the machine they are from."""
    with user_errors():
        from bench_machine import machine_facts, num_cores
        from rich.console import Console

        from tide_ray.calibrate.config import EvaluationConfig
        from tide_ray.calibrate.evaluate import evaluate
        from tide_ray.calibrate.report import print_evaluation

        machine = machine_facts(num_threads or num_cores())
        config = EvaluationConfig.build(
            {
                "routers": checkpoint,
                "prompts": prompts or [],
                "skip": skip,
                "num_prompts": limit,
                "exit_errors": parse_shares("exit_errors", exit_errors),
                "baselines": baselines,
                "max_tokens": parse_positive("max_tokens", max_tokens),
                "num_threads": machine["num_threads"],
            }
        )
        measured = evaluate(config)
    finish("certified", machine, measured, lambda facts: print_evaluation(Console(width=120), facts), output)


@app.command()
def quality(
    checkpoint: Checkpoint,
    prompts: Prompts = None,
    shares: Annotated[str, typer.Option(help="shares of prompt tokens that stop")] = "0.25,0.5,0.75,0.9",
    tail: Annotated[int, typer.Option(help="last prompt tokens that never stop")] = 1,
    few_shot: FewShot = None,
    shots: Shots = 8,
    model: Model = "demo",
    dtype: Dtype = "auto",
    max_tokens: AnswerTokens = 128,
    num_threads: NumThreads = None,
    limit: Limit = None,
    output: Output = None,
) -> None:
    """What exits at each boundary cost in agreement with full depth, by K/V policy and by who chooses prompt tokens."""
    with user_errors():
        from bench_machine import machine_facts, num_cores
        from bench_quality import run_quality
        from bench_report import print_quality_report

        machine = machine_facts(num_threads or num_cores())
        measured = run_quality(
            workload_from(prompts, few_shot, shots, model=model, dtype=dtype, max_tokens=max_tokens, limit=limit),
            checkpoint,
            shares=parse_shares("shares", shares),
            tail=parse_positive("tail", tail),
            num_threads=machine["num_threads"],
        )
    finish("quality", machine, measured, print_quality_report, output)


@app.command()
def few_shot(
    source: Annotated[str, typer.Argument(help="JSONL with prompt and answer")],
    shots: Shots = 8,
    limit: Annotated[int, typer.Option(help="prompts")] = 64,
    skip: Annotated[int, typer.Option(help="rows to leave out, such as those that ``exits`` takes")] = 0,
    output: Annotated[str | None, typer.Option(help="file to write; default: standard output")] = None,
) -> None:
    """Write questions, each after solved ones of its own, as JSONL prompts: what ``exits --few-shot`` asks."""
    with user_errors():
        import json

        from bench_workload import few_shot_texts

        from tide_ray.types import UserError

        if skip < 0:
            raise UserError(f"skip must be at least 0, got {skip}")
        texts = few_shot_texts(source, parse_positive("shots", shots), parse_positive("limit", limit), skip=skip)
        lines = "".join(json.dumps({"prompt": text}) + "\n" for text in texts)
        if output is None:
            typer.echo(lines, nl=False)
            return
        try:
            Path(output).write_text(lines, encoding="utf-8")
        except OSError as error:
            raise UserError(f"output cannot be written, got {output!r} ({error.strerror})") from None


@app.command()
def calibration(
    text: Annotated[str, typer.Argument(help="text file, one sample per line")],
    samples: Annotated[int, typer.Option(help="lines of more than 100 characters to use")] = 2000,
    max_tokens: Annotated[int, typer.Option(help="tokens of each sample that ours reads; the recipe reads 512")] = 64,
    epochs: Annotated[int, typer.Option(help="epochs of the recipe to run; its time is scaled to 100")] = 100,
    model: Model = "demo",
    dtype: Dtype = "auto",
    num_threads: NumThreads = None,
    output: Output = None,
) -> None:
    """Calibration on text against the recipe of TIDE, on the same samples."""
    with user_errors():
        from bench_calibration import run_calibration
        from bench_machine import machine_facts, num_cores
        from bench_report import print_calibration_report

        machine = machine_facts(num_threads or num_cores())
        measured = run_calibration(
            text,
            model=model,
            dtype=dtype,
            samples=parse_positive("samples", samples),
            max_tokens=parse_positive("max_tokens", max_tokens),
            epochs=parse_positive("epochs", epochs),
            num_threads=machine["num_threads"],
        )
    finish("calibration", machine, measured, print_calibration_report, output)
