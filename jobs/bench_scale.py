"""How a job grows: two actors against one on the same rows, and the driver's memory against the number of rows.

Every job is ``tide-ray generate`` on a Ray of its own, in a process of its own. ``tokens_per_second`` is the job's,
from the actors' first rows to their last batch, so that neither Ray's start nor loading a model counts, but a second
actor that is ready later does. Every engine has one thread: with two actors twice as many cores compute.

Memory rows have eight token ids and one new token each, of a random model small enough that a million rows take
minutes. The driver's peak is its process's VmHWM from start to exit code, the input snapshot and the final check
included; what is there for any job (Python, Ray, torch) falls out of the slope from one number of rows to the next.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench_memory import peak_memory_bytes
from bench_workload import Workload
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from tide_ray.data.job import EXIT_OK, EXIT_ROW_ERRORS, run_generate
from tide_ray.data.job_config import GenerateJobConfig
from tide_ray.data.manifest import read_parts
from tide_ray.data.parts import ERRORS_FOLDER
from tide_ray.data.verify import verify_job
from tide_ray.types import JobError, UserError

VOCAB_SIZE = 256
PROMPT_TOKENS = 8
ACTORS = (1, 2)


def run_scale(
    workload: Workload | None, *, actor_rows: int, max_num_seqs: int, rounds: int, memory_rows: list[int]
) -> dict[str, Any]:
    """Measure both; returns the facts that are printed and written.

    Args:
        workload: what the actors are asked, over and over up to ``actor_rows``; None: memory only.
        max_num_seqs: residents of each actor.
        memory_rows: numbers of rows, ascending; none: actors only.
    """
    facts: dict[str, Any] = {"actors": None, "memory": None}
    with tempfile.TemporaryDirectory(prefix="scale", ignore_cleanup_errors=True) as scratch:
        if workload is not None:
            facts["actors"] = _actors(workload, Path(scratch), actor_rows, max_num_seqs, rounds)
        if memory_rows:
            facts["memory"] = _memory(Path(scratch), memory_rows)
    return facts


def _actors(workload: Workload, scratch: Path, num_rows: int, max_num_seqs: int, rounds: int) -> dict[str, Any]:
    prompts = scratch / "actor-prompts.jsonl"
    texts = (workload.texts * -(-num_rows // len(workload.texts)))[:num_rows]
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    settings = {
        "model": workload.model,
        "dtype": workload.dtype,
        "max_tokens": workload.max_tokens,
        "max_num_seqs": max_num_seqs,
        "prompts": [str(prompts)],
        "prefix_caching": False,
        "ignore_eos": True,
    }
    rates: dict[int, list[float]] = {number: [] for number in ACTORS}
    for round_number in range(rounds):
        for number in ACTORS if round_number % 2 == 0 else reversed(ACTORS):
            output = scratch / f"actors-{number}-{round_number}"
            rates[number].append(_job({**settings, "num_actors": number}, output)["tokens_per_second"])
    ratios = [two / one for one, two in zip(*rates.values(), strict=True)]
    return {
        "model": workload.model,
        "sources": workload.sources,
        "rows": num_rows,
        "max_tokens": workload.max_tokens,
        "max_num_seqs": max_num_seqs,
        "rounds": rounds,
        "tokens_per_second": {str(number): rates[number] for number in ACTORS},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_rounds": [round(ratio, 3) for ratio in ratios],
    }


def _memory(scratch: Path, memory_rows: list[int]) -> dict[str, Any]:
    model = scratch / "model"
    _save_random_model(model)
    jobs = []
    for num_rows in memory_rows:
        prompts = scratch / f"memory-{num_rows}.jsonl"
        _write_token_prompts(prompts, num_rows)
        settings = {"model": str(model), "dtype": "float32", "max_tokens": 1, "max_model_len": 2 * PROMPT_TOKENS}
        job = _job({**settings, "prompts": [str(prompts)]}, scratch / f"memory-{num_rows}")
        jobs.append({"rows": num_rows, **{name: job[name] for name in ("peak_rss_bytes", "wall_seconds")}})
        print(jobs[-1], file=sys.stderr, flush=True)
    return {"jobs": jobs, "bytes_per_row": bytes_per_row(jobs)}


def bytes_per_row(jobs: list[dict[str, Any]]) -> list[float]:
    """How much the peak grew from each job to the next, for each row that the next had more."""
    return [
        round((more["peak_rss_bytes"] - fewer["peak_rss_bytes"]) / (more["rows"] - fewer["rows"]), 1)
        for fewer, more in pairwise(jobs)
    ]


def _save_random_model(folder: Path) -> None:
    """A LLaMA of one narrow layer without a tokenizer, which takes token ids."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _write_token_prompts(path: Path, num_rows: int) -> None:
    """Prompts that all differ: the row's number in the base of the vocabulary, without its special ids."""
    base = VOCAB_SIZE - 3
    with path.open("w", encoding="utf-8") as file:
        for row in range(num_rows):
            ids = [3 + row // base**digit % base for digit in range(PROMPT_TOKENS)]
            file.write(json.dumps({"prompt_token_ids": ids}) + "\n")


def _job(settings: dict[str, Any], output: Path) -> dict[str, Any]:
    """Run a job in a process of its own and check its output; its ``run.json`` and the driver's peak.

    Raises:
        UserError: the model cannot take a prompt.
        JobError: the job failed, or its output is not what it promised.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        peak = alone.submit(_run_job, {**settings, "output": str(output), "num_threads": 1}).result()
    if problems := verify_job(output).problems:
        raise JobError(f"the job's output is damaged: {problems[0]}")
    facts: dict[str, Any] = json.loads((output / "run.json").read_text(encoding="utf-8"))
    return {**facts, "peak_rss_bytes": peak}


def _run_job(settings: dict[str, Any]) -> int:
    """Be the driver. Returns the most bytes that this process has held. Raises as ``_job`` does."""
    code = run_generate(GenerateJobConfig.build(settings), Console(stderr=True, quiet=True))
    if code == EXIT_ROW_ERRORS:
        rejected = next(read_parts(Path(settings["output"]), ERRORS_FOLDER, ["error"]))
        raise UserError(f"prompts: {rejected['error'][0].as_py()}")
    if code != EXIT_OK:
        raise JobError(f"the job ended with exit code {code}")
    return peak_memory_bytes()


def print_scale_report(facts: dict[str, Any]) -> None:
    """Print what the second actor brings, and what a row costs the driver."""
    console = Console(width=120)
    if (actors := facts["actors"]) is not None:
        medians = {number: statistics.median(rates) for number, rates in actors["tokens_per_second"].items()}
        console.print(
            f"{actors['model']}, {actors['rows']:,} rows, one thread an actor: two actors "
            f"{medians['2']:,.1f} tokens/s, one {medians['1']:,.1f}; ratio {actors['ratio']:.2f} "
            f"({min(actors['ratio_rounds']):.2f} to {max(actors['ratio_rounds']):.2f} in {actors['rounds']} rounds)"
        )
    if (memory := facts["memory"]) is not None:
        table = Table(title="the driver's memory", title_justify="left")
        for column in ("rows", "peak MB", "seconds", "bytes per further row"):
            table.add_column(column, justify="right")
        for job, slope in zip(memory["jobs"], [None, *memory["bytes_per_row"]], strict=True):
            peak, further = f"{job['peak_rss_bytes'] / 1e6:,.1f}", "" if slope is None else f"{slope:,.1f}"
            table.add_row(f"{job['rows']:,}", peak, f"{job['wall_seconds']:,.1f}", further)
        console.print(table)
