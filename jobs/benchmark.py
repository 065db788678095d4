"""Benchmarks: ratios in one run, contenders interleaved, medians with their spread, and a last line of JSON.

``python jobs/benchmark.py throughput`` compares the engine at full depth with HuggingFace ``generate`` in static
batches on the same prompts, says where the engine's time goes, and what the Ray job adds to the bare engine. ``peers``
compares it with everything else that answers prompts here, and with what the machine allows. ``depth`` measures
forced exits, ``exits`` the speed of a router checkpoint, ``verified`` that of its drafts, ``quality`` what its exits
cost in agreement, ``prefix`` what prompts that begin alike save, ``serving`` the server under load,
``faults`` what killed processes cost a job, ``scale`` what a second actor brings and what a row costs the driver's
memory; ``kernels`` measures the GPU kernels, and ``kernel-resources`` compiles them for every architecture without a
GPU. Prefix caching is off but in ``prefix``, ``serving``, ``faults`` and the memory of ``scale``: rounds repeat their
prompts, and all compute them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from bench_options import (
    AnswerTokens,
    Checkpoint,
    Dtype,
    EngineSeqs,
    FewShot,
    HFBatchSizes,
    HFContinuous,
    Limit,
    Model,
    NumThreads,
    Output,
    Prompts,
    Rounds,
    Shots,
    finish,
    parse_numbers,
    parse_positive,
    parse_shares,
    user_errors,
    workload_from,
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Benchmarks of tide_ray."""


@app.command()
def throughput(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="JSONL files with a prompt column, FILE or FILE:N for its first N; default: demo prompts"),
    ] = None,
    model: Model = "demo",
    dtype: Dtype = "auto",
    max_tokens: Annotated[int, typer.Option(help="most new tokens per prompt; answers end at EOS")] = 128,
    rounds: Rounds = 3,
    engine_seqs: EngineSeqs = "64,128",
    hf_batch_sizes: HFBatchSizes = "64,128",
    num_threads: NumThreads = None,
    limit: Limit = None,
    hf_continuous: HFContinuous = False,
    ray_repeats: Annotated[
        int, typer.Option(help="times that Ray job and bare engine are asked every prompt; 0: no Ray job", min=0)
    ] = 4,
    output: Output = None,
) -> None:
    """Engine at full depth against HF generate, its profile, and the Ray job against the bare engine."""
    from tide_ray.types import UserError

    with user_errors():
        for name, value in (
            ("max_tokens", max_tokens),
            ("rounds", rounds),
            ("num_threads", num_threads),
            ("limit", limit),
        ):
            if value is not None:
                parse_positive(name, value)
        numbers = parse_numbers("engine_seqs", engine_seqs), parse_numbers("hf_batch_sizes", hf_batch_sizes)
        if output is not None and Path(output).is_dir():
            raise UserError(f"output must be a file, got the folder {output!r}")

        from bench_machine import machine_facts, num_cores
        from bench_report import print_report
        from bench_throughput import run_throughput
        from bench_workload import Workload

        machine = machine_facts(num_threads or num_cores())
        if machine["is_busy"]:
            typer.echo(f"load average {machine['load_average']}: this machine is busy, ratios will be off", err=True)
        measured = run_throughput(
            Workload.read(prompts or [], model=model, dtype=dtype, max_tokens=max_tokens, limit=limit),
            rounds=rounds,
            engine_seqs=numbers[0],
            hf_batch_sizes=numbers[1],
            num_threads=machine["num_threads"],
            with_hf_continuous=hf_continuous,
            ray_repeats=ray_repeats,
        )
    finish("throughput", machine, measured, print_report, output)


@app.command()
def peers(
    prompts: Annotated[list[str] | None, typer.Option(help="JSONL file, FILE or FILE:N; may be given again")] = None,
    exits: Annotated[str | None, typer.Option(help="folder of a router checkpoint to run as well")] = None,
    gguf: Annotated[str | None, typer.Option(help="the model's GGUF file for OpenVINO; default: demo's")] = None,
    model: Model = "demo",
    dtype: Dtype = "auto",
    max_tokens: AnswerTokens = 128,
    rounds: Rounds = 3,
    engine_seqs: EngineSeqs = "64,128",
    hf_batch_sizes: HFBatchSizes = "64,128",
    hf_continuous: HFContinuous = False,
    num_threads: NumThreads = None,
    limit: Limit = None,
    output: Output = None,
) -> None:
    """Engine at full depth and with exits, HF generate and OpenVINO GenAI, each at its best batch size."""
    with user_errors():
        from bench_machine import machine_facts, num_cores
        from bench_peers import run_peers
        from bench_report import print_peers_report

        machine = machine_facts(num_threads or num_cores())
        measured = run_peers(
            workload_from(prompts, None, 0, model=model, dtype=dtype, max_tokens=max_tokens, limit=limit),
            checkpoint=exits,
            gguf=gguf,
            rounds=parse_positive("rounds", rounds),
            engine_seqs=parse_numbers("engine_seqs", engine_seqs),
            hf_batch_sizes=parse_numbers("hf_batch_sizes", hf_batch_sizes),
            num_threads=machine["num_threads"],
            with_hf_continuous=hf_continuous,
        )
    finish("peers", machine, measured, print_peers_report, output)


@app.command()
def depth(
    scenarios: Annotated[
        str, typer.Option(help="DEPTH:SHARE of tokens made to exit there, separated by commas")
    ] = "15:0.5,24:0.3",
    residents: Annotated[str, typer.Option(help="resident sequences, separated by commas")] = "1,8,32,64,128,256",
    model: Model = "demo",
    dtype: Dtype = "auto",
    rounds: Rounds = 3,
    tokens: Annotated[int, typer.Option(help="tokens per resident in each run")] = 24,
    num_threads: NumThreads = None,
    output: Output = None,
) -> None:
    """Forced exits under several launch policies against full depth at the same residents, beside their limits."""
    with user_errors():
        for name, value in (("rounds", rounds), ("tokens", tokens), ("num_threads", num_threads)):
            if value is not None:
                parse_positive(name, value)
        counts = parse_numbers("residents", residents)

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
            num_threads=machine["num_threads"],
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
def prefix(
    few_shot: Annotated[str, typer.Argument(help="JSONL with prompt and answer: questions after solved ones")],
    shots: Shots = 8,
    model: Model = "demo",
    dtype: Dtype = "auto",
    max_tokens: AnswerTokens = 32,
    max_num_seqs: Annotated[int, typer.Option(help="resident sequences")] = 64,
    rounds: Rounds = 3,
    num_threads: NumThreads = None,
    limit: Annotated[int, typer.Option(help="prompts")] = 64,
    output: Output = None,
) -> None:
    """Prefix caching on and off: questions behind the same solved examples, and behind examples of their own."""
    with user_errors():
        from bench_machine import machine_facts, num_cores
        from bench_prefix import run_prefix
        from bench_report import print_prefix_report

        machine = machine_facts(num_threads or num_cores())
        measured = run_prefix(
            few_shot,
            shots=parse_positive("shots", shots),
            model=model,
            dtype=dtype,
            max_tokens=parse_positive("max_tokens", max_tokens),
            max_num_seqs=parse_positive("max_num_seqs", max_num_seqs),
            rounds=parse_positive("rounds", rounds),
            num_threads=machine["num_threads"],
            limit=parse_positive("limit", limit),
        )
    finish("prefix", machine, measured, print_prefix_report, output)


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


@app.command()
def kernels(
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "bfloat16",
    rows: Annotated[str, typer.Option(help="numbers of rows, separated by commas")] = "1,8,32,128,512",
    hidden: Annotated[int, typer.Option(help="width of a row")] = 4096,
    context: Annotated[int, typer.Option(help="tokens that each row attends to")] = 4096,
    output: Output = None,
) -> None:
    """GPU kernels replayed from graphs: share of copy bandwidth, beside torch eager and torch.compile."""
    with user_errors():
        from bench_kernels import run_kernels
        from bench_machine import machine_facts, num_cores
        from bench_report import print_kernels_report

        measured = run_kernels(
            dtype=dtype,
            rows=parse_numbers("rows", rows),
            hidden=parse_positive("hidden", hidden),
            context=parse_positive("context", context),
        )
        machine = machine_facts(num_cores())
    finish("kernels", machine, measured, print_kernels_report, output)


@app.command("kernel-resources")
def kernel_resources(
    architectures: Annotated[
        str, typer.Option(help="compute capabilities, separated by commas")
    ] = "7.5,8.0,8.6,8.9,9.0,10.0,12.0",
    names: Annotated[str, typer.Option(help="beginnings of kernels' names, separated by commas; default: all")] = "",
    output: Output = None,
) -> None:
    """Registers, shared memory and spills of every GPU kernel on every architecture. Takes no GPU, but minutes."""
    with user_errors():
        from bench_kernel_resources import run_kernel_resources
        from bench_machine import machine_facts, num_cores
        from bench_report import print_kernel_resources_report

        measured = run_kernel_resources(
            [text.strip() for text in architectures.split(",")], [text.strip() for text in names.split(",") if text]
        )
        machine = machine_facts(num_cores())
    finish("kernel-resources", machine, measured, print_kernel_resources_report, output)


if __name__ == "__main__":
    app()
