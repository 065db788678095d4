"""Mode ``verified`` against full depth: time for the same answers, with as many prompts at once as there are residents.

``verified`` lets the cost model decide whether to draft; ``always drafting`` is what it decides about. Both have to
give full depth's answers.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from bench_workload import Workload

from tide_ray import EngineConfig, TideEngine
from tide_ray.calibrate.follow import answer
from tide_ray.models import load

FEWEST_PROMPTS = 8
"""Prompts of a run, one group of residents after another: one alone would be over before it can be timed."""


def run_verified(
    workload: Workload,
    checkpoint: str,
    *,
    exit_error: float,
    residents: Sequence[int],
    rounds: int,
    num_threads: int,
) -> dict[str, Any]:
    """Measure every number of residents; returns the facts that are printed and written."""
    torch.set_num_threads(num_threads)
    loaded = load(workload.model, dtype=workload.dtype)
    prompts = workload.token_ids(loaded)
    settings: dict[str, Any] = {
        "dtype": workload.dtype,
        "max_num_seqs": max(residents),
        "max_model_len": max(map(len, prompts)) + workload.max_tokens,
        "kv_memory_fraction": 0.2,
        "num_threads": num_threads,
        "prefix_caching": False,  # every round asks the same prompts, and everyone must compute them
    }
    drafting: dict[str, Any] = {"exits": checkpoint, "mode": "verified", "exit_error": exit_error}
    engines = {
        "full depth": TideEngine(loaded, EngineConfig(**settings)),
        "verified": TideEngine(loaded, EngineConfig(**settings, **drafting)),
        "always drafting": TideEngine(loaded, EngineConfig(**settings, **drafting, exits_when="always")),
    }
    for engine in engines.values():
        engine.warm_up()
    described = engines["verified"].describe()["exits"]
    return {
        "model": workload.model,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "boundaries": described["boundaries"],
        "thresholds": described["thresholds"],
        "exit_error": exit_error,
        "sources": workload.sources,
        "max_tokens": workload.max_tokens,
        "rounds": rounds,
        "residents": [_at_residents(engines, prompts, count, workload.max_tokens, rounds) for count in residents],
    }


def _at_residents(
    engines: dict[str, TideEngine], prompts: list[list[int]], residents: int, max_tokens: int, rounds: int
) -> dict[str, Any]:
    count = max(residents, FEWEST_PROMPTS)
    asked = [prompts[n % len(prompts)] for n in range(-(-count // residents) * residents)]
    groups = [asked[start : start + residents] for start in range(0, len(asked), residents)]
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    answers: dict[str, list[list[int]]] = {}
    for engine in engines.values():
        engine.stats.reset()
    for number in range(rounds):
        turns = list(engines.items())
        for name, engine in turns if number % 2 == 0 else reversed(turns):
            start = time.perf_counter()
            answers[name] = [ids for group in groups for ids in answer(engine, group, max_tokens)]
            seconds[name].append(time.perf_counter() - start)
    base = answers["full depth"]
    num_tokens = sum(map(len, base))
    # Turns are compared with full depth's of the same round: what slows the machine for a while slows both.
    ratios = {
        name: [full / own for full, own in zip(seconds["full depth"], seconds[name], strict=True)] for name in engines
    }
    drafting = {name: engine for name, engine in engines.items() if name != "full depth"}
    return {
        "residents": residents,
        "prompts": len(asked),
        "tokens": num_tokens,
        "tokens_per_second": {name: round(num_tokens / statistics.median(s), 1) for name, s in seconds.items()},
        "speedup": {name: round(statistics.median(each), 3) for name, each in ratios.items()},
        "spread": {name: [round(min(each), 3), round(max(each), 3)] for name, each in ratios.items()},
        "identical_answers": {
            name: round(sum(a == b for a, b in zip(answers[name], base, strict=True)) / len(base), 4)
            for name in drafting
        },
        "drafts_per_token": {
            name: round((e.stats.num_accepted_drafts + e.stats.num_rejected_drafts) / (rounds * num_tokens), 4)
            for name, e in drafting.items()
        },
        "accepted": {name: _accepted(engine) for name, engine in drafting.items()},
        "boundaries_on": {name: engine.describe()["exits"]["boundaries_on"] for name, engine in drafting.items()},
    }


def _accepted(engine: TideEngine) -> float | None:
    """Share of the drafts that full depth confirmed; None where nothing was drafted."""
    stats = engine.stats
    drafts = stats.num_accepted_drafts + stats.num_rejected_drafts
    return round(stats.num_accepted_drafts / drafts, 4) if drafts else None
