"""What prefix caching saves where prompts begin alike, and what it costs where they do not.

The same questions are asked behind solved examples that all of them share, and behind examples of their own, by an
engine with prefix caching and by one without, in turn. The cache is emptied before every run: what a run finds it has
computed itself.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_contenders import KV_MEMORY_FRACTION, Contender, agreement, engine_settings, take_turns
from bench_workload import Workload, few_shot_texts

from tide_ray import EngineConfig, TideEngine
from tide_ray.models import load


def run_prefix(
    few_shot: str, *, shots: int, limit: int, rounds: int, num_threads: int, max_num_seqs: int, **settings: Any
) -> dict[str, Any]:
    """Measure both kinds of prompts; returns the facts that are printed and written."""
    torch.set_num_threads(num_threads)
    loaded = load(settings["model"], dtype=settings["dtype"])
    rows = []
    for kind, is_shared in (("one beginning for all", True), ("nothing in common", False)):
        texts = few_shot_texts(few_shot, shots, limit, is_shared=is_shared)
        workload = Workload(sources=[Path(few_shot).name], texts=texts, **settings)
        prompts = workload.token_ids(loaded)
        config = {**engine_settings(workload, prompts, num_threads), "max_num_seqs": max_num_seqs}
        engines = {}
        for name, is_on in (("with", True), ("without", False)):
            config |= {"prefix_caching": is_on, "kv_memory_fraction": KV_MEMORY_FRACTION}
            engines[name] = TideEngine(loaded, EngineConfig(**config))
            engines[name].warm_up()
        contenders = [Contender(name, None, partial(_answers, e, prompts, workload)) for name, e in engines.items()]
        take_turns(contenders, rounds, num_threads)
        caching, plain = contenders
        stats = engines["with"].stats
        seconds = {contender.name: contender.seconds for contender in contenders}
        rows.append(
            {
                "kind": kind,
                "mean_prompt_tokens": round(statistics.mean(map(len, prompts)), 1),
                "hit_rate": round(stats.num_cached_tokens / stats.num_prompt_tokens, 4),
                "seconds": {name: [round(one, 4) for one in each] for name, each in seconds.items()},
                "speedup": round(statistics.median(plain.seconds) / statistics.median(caching.seconds), 3),
                "agreement": agreement(caching.answers, plain.answers),
            }
        )
    return {
        "model": settings["model"],
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "prompts": limit,
        "shots": shots,
        "max_tokens": settings["max_tokens"],
        "max_num_seqs": max_num_seqs,
        "rounds": rounds,
        "kinds": rows,
    }


def _answers(engine: TideEngine, prompts: list[list[int]], workload: Workload) -> list[list[int]]:
    engine.scheduler.pool.clear()
    return [output.outputs[0].token_ids for output in engine.generate(prompts, workload.params())]
