"""What the benchmark commands share: options and their reading, a user's mistakes, and the last line of JSON.

torch and ray are imported only when something runs, so that help is instant.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tide_ray.messages import one_line

if TYPE_CHECKING:
    from bench_workload import Workload

Checkpoint = Annotated[str, typer.Argument(help="folder of a router checkpoint")]
Prompts = Annotated[list[str] | None, typer.Argument(help="JSONL files, FILE or FILE:N; default: demo")]
Shots = Annotated[int, typer.Option(help="solved examples before each question")]
Model = Annotated[str, typer.Option(help="hub id, folder, .gguf file or 'demo'")]
ShapeOrModel = Annotated[str, typer.Option(help="as elsewhere, or random:SHAPE, e.g. random:llama-3-8b")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto")]
AnswerTokens = Annotated[int, typer.Option(help="most new tokens per prompt")]
NumThreads = Annotated[int | None, typer.Option(help="CPU threads; default: all cores")]
Limit = Annotated[int | None, typer.Option(help="use only this many prompts")]
Output = Annotated[str | None, typer.Option(help="write the JSON here as well")]
Rounds = Annotated[int, typer.Option(help="times that every contender runs")]
MinSeconds = Annotated[float, typer.Option(help="seconds that each contender decodes at least", min=0)]
EngineSeqs = Annotated[str, typer.Option(help="resident sequences of the engine, separated by commas")]
HFBatchSizes = Annotated[str, typer.Option(help="static batches of HF generate, separated by commas")]
HFContinuous = Annotated[bool, typer.Option(help="also run HF generate_batch (slow on a CPU)")]
FewShot = Annotated[str | None, typer.Option(help="JSONL with prompt and answer: questions after solved ones")]


def workload_from(
    prompts: list[str] | None, few_shot: str | None, shots: int, *, limit: int | None, **settings: Any
) -> Workload:
    """Prompts from files, or few-shot prompts where ``few_shot`` names a file."""
    from bench_workload import Workload, few_shot_texts

    if few_shot is None:
        return Workload.read(prompts or [], limit=limit, **settings)
    texts = few_shot_texts(few_shot, parse_positive("shots", shots), limit or 64)
    return Workload(sources=[f"{Path(few_shot).name}, {shots} shots"], texts=texts, **settings)


def parse_shares(name: str, text: str) -> list[float]:
    """Numbers in (0, 1] separated by commas. Raises UserError for anything else."""
    from tide_ray.types import UserError

    try:
        shares = [float(part) for part in text.split(",") if part]
    except ValueError:
        shares = [-1.0]
    if not all(0 < share <= 1 for share in shares):
        raise UserError(f"{name} must be numbers in (0, 1] separated by commas, got {text!r}")
    return shares


def finish(
    benchmark: str,
    machine: dict[str, Any],
    measured: dict[str, Any],
    show: Callable[[dict[str, Any]], None],
    output: str | None,
) -> None:
    """The tables, the file if one is asked for, and the last line."""
    facts = {"benchmark": benchmark, **machine, **measured}
    show(facts)
    if output is not None:
        from tide_ray.files import appearing

        path = Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        with appearing(path) as unfinished:
            unfinished.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(facts))


@contextmanager
def user_errors() -> Iterator[None]:
    """A user's mistake ends with one line and exit code 2, a failed job with 1."""
    from tide_ray.types import JobError, UserError

    try:
        yield
    except (UserError, JobError) as error:
        typer.echo(f"error: {one_line(error)}", err=True)
        raise typer.Exit(2 if isinstance(error, UserError) else 1) from None


def parse_positive(name: str, value: int) -> int:
    """The value, if it is at least 1. Raises UserError if not."""
    from tide_ray.types import UserError

    if value < 1:
        raise UserError(f"{name} must be at least 1, got {value}")
    return value


def parse_numbers(name: str, text: str) -> list[int]:
    """Positive integers separated by commas. Raises UserError for anything else."""
    from tide_ray.types import UserError

    try:
        return [parse_positive(name, int(part)) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{name} must be positive integers separated by commas, got {text!r}") from None
