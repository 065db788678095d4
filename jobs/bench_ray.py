"""What the Ray job adds to the bare engine, on the same prompts with as many residents.

Both rates count from a loaded, warm engine. The job's is ``tokens_per_second`` of its ``run.json``: generated tokens
over the time from the actor's first rows to its last finished batch, so getting rows to the actor and back counts, and
starting Ray, loading the model and committing the last part do not (``job_wall_seconds`` has it all). The bare engine's
is generated tokens over the time of one ``generate`` call, in a process of its own as the job's engine is. On a virtual
machine whose host has to find it, memory that a process touches for the first time costs 0.4 GB/s, and more often so in
the job, whose machine was idle for seconds before; it is paid once, so the prompts are asked several times over.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_workload import Workload
from rich.console import Console

from tide_ray import EngineConfig, TideEngine
from tide_ray.data.job import EXIT_OK, run_generate
from tide_ray.data.job_config import GenerateJobConfig
from tide_ray.types import JobError


def ray_overhead(workload: Workload, engine_settings: dict[str, Any], *, rounds: int, repeats: int) -> dict[str, Any]:
    """Bare engine and job in turn, each with the machine to itself. ``overhead`` is of the medians.

    Args:
        engine_settings: EngineConfig fields of both (those that the job has too), without prefix caching.
        repeats: times that every prompt is asked in a round.
    """
    workload = replace(workload, texts=workload.texts * repeats)
    bare, job, walls = [], [], []
    for _ in range(rounds):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
            bare.append(alone.submit(_run_bare, workload, engine_settings).result())
        facts = _run_job(workload, engine_settings)
        job.append(facts["tokens_per_second"])
        walls.append(facts["wall_seconds"])
    middle_bare, middle_job = (round(statistics.median(rates), 1) for rates in (bare, job))
    return {
        "rows": len(workload.texts),
        "bare_tokens_per_second": middle_bare,
        "job_tokens_per_second": middle_job,
        "bare_rounds": bare,
        "job_rounds": job,
        "job_wall_seconds": statistics.median(walls),
        "overhead": round(1 - middle_job / middle_bare, 4),
    }


def _run_bare(workload: Workload, engine_settings: dict[str, Any]) -> float:
    engine = TideEngine.from_pretrained(workload.model, EngineConfig(**engine_settings))
    prompts = workload.prompts(engine.tokenizer)
    engine.warm_up()
    start = time.perf_counter()
    outputs = engine.generate(prompts, workload.params())
    seconds = time.perf_counter() - start
    return round(sum(len(output.outputs[0].token_ids) for output in outputs) / seconds, 1)


def _run_job(workload: Workload, engine_settings: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        prompts, output = Path(scratch) / "prompts.jsonl", Path(scratch) / "out"
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in workload.texts), encoding="utf-8")
        settings = {"model": workload.model, "prompts": [str(prompts)], "output": str(output), **engine_settings}
        config = GenerateJobConfig.build({**settings, "max_tokens": workload.max_tokens})
        code = run_generate(config, Console(stderr=True, quiet=True))
        if code != EXIT_OK:
            raise JobError(f"the Ray job ended with exit code {code}")
        facts: dict[str, Any] = json.loads((output / "run.json").read_text(encoding="utf-8"))
        return facts
