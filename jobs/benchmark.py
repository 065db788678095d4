"""Benchmarks: ratios in one run, contenders interleaved, medians with their spread, and a last line of JSON.

``python jobs/benchmark.py throughput`` compares the engine at full depth with HuggingFace ``generate`` in static
batches on the same prompts, says where the engine's time goes, and what the Ray job adds to the bare engine. ``depth``
measures forced exits, ``exits`` the speed of a router checkpoint, ``quality`` what its exits cost in agreement.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    pass

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
    model: Annotated[str, typer.Option(help="hub id, folder, .gguf file or 'demo'")] = "demo",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto")] = "auto",
    max_tokens: Annotated[int, typer.Option(help="most new tokens per prompt; answers end at EOS")] = 128,
    rounds: Annotated[int, typer.Option(help="times that every contender runs")] = 3,
    engine_seqs: Annotated[str, typer.Option(help="resident sequences of the engine, separated by commas")] = "64,128",
    hf_batch_sizes: Annotated[str, typer.Option(help="static batches of HF generate, separated by commas")] = "64,128",
    num_threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores")] = None,
    limit: Annotated[int | None, typer.Option(help="use only this many prompts")] = None,
    hf_continuous: Annotated[bool, typer.Option(help="also run HF generate_batch (slow on a CPU)")] = False,
    ray: Annotated[bool, typer.Option(help="also run the Ray job and compare it with the bare engine")] = True,
    output: Annotated[str | None, typer.Option(help="write the JSON here as well")] = None,
) -> None:
    """Engine at full depth against HF generate, its profile, and the Ray job against the bare engine."""
    from tide_ray.types import UserError

    with _errors():
        for name, value in (
            ("max_tokens", max_tokens),
            ("rounds", rounds),
            ("num_threads", num_threads),
            ("limit", limit),
        ):
            if value is not None:
                _positive(name, value)
        numbers = _numbers("engine_seqs", engine_seqs), _numbers("hf_batch_sizes", hf_batch_sizes)
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
            with_ray=ray,
        )
    facts = {"benchmark": "throughput", **machine, **measured}
    print_report(facts)
    _finish(facts, output)


@app.command()
def depth(
    scenarios: Annotated[
        str, typer.Option(help="DEPTH:SHARE of tokens made to exit there, separated by commas")
    ] = "15:0.5,24:0.3",
    residents: Annotated[str, typer.Option(help="resident sequences, separated by commas")] = "1,8,32,64,128,256",
    model: Annotated[str, typer.Option(help="hub id, folder, .gguf file or 'demo'")] = "demo",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto")] = "auto",
    rounds: Annotated[int, typer.Option(help="times that every contender runs")] = 3,
    tokens: Annotated[int, typer.Option(help="tokens per resident in each run")] = 24,
    num_threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores")] = None,
    output: Annotated[str | None, typer.Option(help="write the JSON here as well")] = None,
) -> None:
    """Forced exits under several launch policies against full depth at the same residents, beside their limits."""
    with _errors():
        for name, value in (("rounds", rounds), ("tokens", tokens), ("num_threads", num_threads)):
            if value is not None:
                _positive(name, value)
        counts = _numbers("residents", residents)

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
    facts = {"benchmark": "depth", **machine, **measured}
    print_depth_report(facts)
    _finish(facts, output)


@app.command()
def exits(
    checkpoint: Annotated[str, typer.Argument(help="folder of a router checkpoint")],
    prompts: Annotated[list[str] | None, typer.Argument(help="JSONL files, FILE or FILE:N; default: demo")] = None,
    errors: Annotated[str, typer.Option(help="calibrated error levels, separated by commas")] = "0.01,0.05",
    prefill_shares: Annotated[str, typer.Option(help="shares of prompt tokens that stop, or nothing")] = "",
    residents: Annotated[str, typer.Option(help="also decode with exactly these many residents")] = "",
    few_shot: Annotated[
        str | None, typer.Option(help="JSONL with prompt and answer: questions after solved ones")
    ] = None,
    shots: Annotated[int, typer.Option(help="solved examples before each question")] = 8,
    model: Annotated[str, typer.Option(help="hub id, folder, .gguf file or 'demo'")] = "demo",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto")] = "auto",
    max_tokens: Annotated[int, typer.Option(help="most new tokens per prompt")] = 128,
    max_num_seqs: Annotated[int, typer.Option(help="resident sequences")] = 64,
    rounds: Annotated[int, typer.Option(help="times that every contender runs")] = 3,
    num_threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores")] = None,
    limit: Annotated[int | None, typer.Option(help="use only this many prompts")] = None,
    output: Annotated[str | None, typer.Option(help="write the JSON here as well")] = None,
) -> None:
    """A router checkpoint against full depth: speed, agreement with full depth, and their limits."""
    with _errors():
        from bench_exits import run_exits
        from bench_machine import machine_facts, num_cores
        from bench_report import print_exits_report

        machine = machine_facts(num_threads or num_cores())
        measured = run_exits(
            _workload(prompts, few_shot, shots, model=model, dtype=dtype, max_tokens=max_tokens, limit=limit),
            checkpoint,
            errors=_shares("errors", errors),
            prefill_shares=_shares("prefill_shares", prefill_shares),
            residents=_numbers("residents", residents) if residents else [],
            rounds=_positive("rounds", rounds),
            num_threads=machine["num_threads"],
            max_num_seqs=_positive("max_num_seqs", max_num_seqs),
        )
    facts = {"benchmark": "exits", **machine, **measured}
    print_exits_report(facts)
    _finish(facts, output)


@app.command()
def quality(
    checkpoint: Annotated[str, typer.Argument(help="folder of a router checkpoint")],
    prompts: Annotated[list[str] | None, typer.Argument(help="JSONL files, FILE or FILE:N; default: demo")] = None,
    shares: Annotated[str, typer.Option(help="shares of prompt tokens that stop")] = "0.25,0.5,0.75,0.9",
    tail: Annotated[int, typer.Option(help="last prompt tokens that never stop")] = 1,
    few_shot: Annotated[
        str | None, typer.Option(help="JSONL with prompt and answer: questions after solved ones")
    ] = None,
    shots: Annotated[int, typer.Option(help="solved examples before each question")] = 8,
    model: Annotated[str, typer.Option(help="hub id, folder, .gguf file or 'demo'")] = "demo",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto")] = "auto",
    max_tokens: Annotated[int, typer.Option(help="most new tokens per prompt")] = 128,
    num_threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores")] = None,
    limit: Annotated[int | None, typer.Option(help="use only this many prompts")] = None,
    output: Annotated[str | None, typer.Option(help="write the JSON here as well")] = None,
) -> None:
    """What exits at each boundary cost in agreement with full depth, by K/V policy and by who chooses prompt tokens."""
    with _errors():
        from bench_machine import machine_facts, num_cores
        from bench_quality import run_quality
        from bench_report import print_quality_report

        machine = machine_facts(num_threads or num_cores())
        measured = run_quality(
            _workload(prompts, few_shot, shots, model=model, dtype=dtype, max_tokens=max_tokens, limit=limit),
            checkpoint,
            shares=_shares("shares", shares),
            tail=_positive("tail", tail),
            num_threads=machine["num_threads"],
        )
    facts = {"benchmark": "quality", **machine, **measured}
    print_quality_report(facts)
    _finish(facts, output)


@app.command()
def calibration(
    text: Annotated[str, typer.Argument(help="text file, one sample per line")],
    samples: Annotated[int, typer.Option(help="lines of more than 100 characters to use")] = 2000,
    max_tokens: Annotated[int, typer.Option(help="tokens of each sample that ours reads; the recipe reads 512")] = 64,
    epochs: Annotated[int, typer.Option(help="epochs of the recipe to run; its time is scaled to 100")] = 100,
    model: Annotated[str, typer.Option(help="hub id, folder, .gguf file or 'demo'")] = "demo",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto")] = "auto",
    num_threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores")] = None,
    output: Annotated[str | None, typer.Option(help="write the JSON here as well")] = None,
) -> None:
    """Calibration on text against the recipe of TIDE, on the same samples."""
    with _errors():
        from bench_calibration import run_calibration
        from bench_machine import machine_facts, num_cores
        from bench_report import print_calibration_report

        machine = machine_facts(num_threads or num_cores())
        measured = run_calibration(
            text,
            model=model,
            dtype=dtype,
            samples=_positive("samples", samples),
            max_tokens=_positive("max_tokens", max_tokens),
            epochs=_positive("epochs", epochs),
            num_threads=machine["num_threads"],
        )
    facts = {"benchmark": "calibration", **machine, **measured}
    print_calibration_report(facts)
    _finish(facts, output)


def _workload(
    prompts: list[str] | None, few_shot: str | None, shots: int, *, limit: int | None, **settings: Any
) -> Any:
    from bench_workload import Workload, few_shot_texts

    if few_shot is None:
        return Workload.read(prompts or [], limit=limit, **settings)
    texts = few_shot_texts(few_shot, _positive("shots", shots), limit or 64)
    return Workload(sources=[f"{Path(few_shot).name}, {shots} shots"], texts=texts, **settings)


def _shares(name: str, text: str) -> list[float]:
    from tide_ray.types import UserError

    try:
        shares = [float(part) for part in text.split(",") if part]
    except ValueError:
        shares = [-1.0]
    if not all(0 < share <= 1 for share in shares):
        raise UserError(f"{name} must be numbers in (0, 1] separated by commas, got {text!r}")
    return shares


def _finish(facts: dict[str, Any], output: str | None) -> None:
    """The file if one is asked for, and the last line."""
    if output is not None:
        _write(Path(output), json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))


@contextmanager
def _errors() -> Iterator[None]:
    """A user's mistake ends with one line and exit code 2, a failed job with 1."""
    from tide_ray.data.job_folder import JobError
    from tide_ray.types import UserError

    try:
        yield
    except (UserError, JobError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2 if isinstance(error, UserError) else 1) from None


def _positive(name: str, value: int) -> int:
    from tide_ray.types import UserError

    if value < 1:
        raise UserError(f"{name} must be at least 1, got {value}")
    return value


def _numbers(name: str, text: str) -> list[int]:
    from tide_ray.types import UserError

    try:
        return [_positive(name, int(part)) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{name} must be positive integers separated by commas, got {text!r}") from None


def _write(path: Path, text: str) -> None:
    """Write a whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


if __name__ == "__main__":
    app()
