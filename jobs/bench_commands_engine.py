"""Commands of ``benchmark.py`` about speed of the engine and of its kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from bench_options import (
    AnswerTokens,
    Dtype,
    EngineSeqs,
    HFBatchSizes,
    HFContinuous,
    Limit,
    Model,
    NumThreads,
    Output,
    Rounds,
    ShapeOrModel,
    Shots,
    finish,
    parse_numbers,
    parse_positive,
    user_errors,
    workload_from,
)

app = typer.Typer()


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
def decode(
    residents: Annotated[str, typer.Option(help="resident sequences, separated by commas")] = "1,8,32,128",
    model: ShapeOrModel = "demo",
    dtype: Dtype = "auto",
    hf: Annotated[str, typer.Option(help="HF generate as well: none, eager or compiled")] = "eager",
    prompt_tokens: Annotated[int, typer.Option(help="tokens of each prompt")] = 64,
    tokens: Annotated[int, typer.Option(help="tokens per resident in each run")] = 64,
    rounds: Rounds = 3,
    num_threads: NumThreads = None,
    output: Output = None,
) -> None:
    """Steps that decode at full depth: the engine, HF generate, and what the machine allows."""
    with user_errors():
        from bench_decode import run_decode
        from bench_machine import machine_facts, num_cores
        from bench_report_device import print_decode_report

        from tide_ray.types import UserError

        if hf not in ("none", "eager", "compiled"):
            raise UserError(f"hf must be one of none, eager, compiled, got {hf!r}")
        machine = machine_facts(num_threads or num_cores())
        measured = run_decode(
            model=model,
            dtype=dtype,
            residents=parse_numbers("residents", residents),
            prompt_tokens=parse_positive("prompt_tokens", prompt_tokens),
            tokens=parse_positive("tokens", tokens),
            rounds=parse_positive("rounds", rounds),
            hf=hf,
            num_threads=machine["num_threads"],
        )
    finish("decode", machine, measured, print_decode_report, output)


@app.command()
def kernels(
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "bfloat16",
    rows: Annotated[str, typer.Option(help="numbers of rows, separated by commas")] = "1,8,32,128,512",
    hidden: Annotated[int, typer.Option(help="width of a row")] = 4096,
    context: Annotated[int, typer.Option(help="tokens that each row attends to")] = 4096,
    torch_rows: Annotated[str | None, typer.Option(help="numbers of rows that torch gets, too; default: all")] = None,
    output: Output = None,
) -> None:
    """GPU kernels replayed from graphs: share of copy bandwidth, beside torch eager and torch.compile."""
    with user_errors():
        from bench_kernels import run_kernels
        from bench_machine import machine_facts, num_cores
        from bench_report_device import print_kernels_report

        measured = run_kernels(
            dtype=dtype,
            rows=parse_numbers("rows", rows),
            hidden=parse_positive("hidden", hidden),
            context=parse_positive("context", context),
            torch_rows=None if torch_rows is None else parse_numbers("torch_rows", torch_rows),
        )
        machine = machine_facts(num_cores())
    finish("kernels", machine, measured, print_kernels_report, output)


@app.command("kernel-resources")
def kernel_resources(
    architectures: Annotated[
        str, typer.Option(help="compute capabilities, separated by commas; default: all that CUDA 13 compiles for")
    ] = "",
    names: Annotated[str, typer.Option(help="beginnings of kernels' names, separated by commas; default: all")] = "",
    output: Output = None,
) -> None:
    """Registers, shared memory and spills of every GPU kernel on every architecture. Takes no GPU, but minutes."""
    with user_errors():
        from bench_kernel_resources import run_kernel_resources
        from bench_machine import machine_facts, num_cores
        from bench_report_device import print_kernel_resources_report

        measured = run_kernel_resources(
            [text.strip() for text in architectures.split(",") if text],
            [text.strip() for text in names.split(",") if text],
        )
        machine = machine_facts(num_cores())
    finish("kernel-resources", machine, measured, print_kernel_resources_report, output)
