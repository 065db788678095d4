"""A real router checkpoint against full depth: speed, and how often its tokens are full depth's.

Agreement is measured twice, through the engine itself. Teacher-forced: every variant is made to follow full depth's
answers, and each token that it would have chosen is compared; K/V of exits are in place as in generation. Free: the
variant answers by itself. Intervals are over prompts (bootstrap). ``full depth, again`` is the noise floor: of
agreement full depth against itself in another batch composition, of speed full depth's second turn in every round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from bench_depth import AGAIN, Contender, answer_room, take_turns
from bench_workload import Workload

from tide_ray import EngineConfig, TideEngine
from tide_ray.calibrate.follow import answer, follow
from tide_ray.calibrate.intervals import interval
from tide_ray.exits.checkpoint import Routers
from tide_ray.models import LoadedModel, load

PROMPT_TOKENS, DECODE_TOKENS = 64, 24


@dataclass(slots=True)
class Variant:
    """An engine configuration to compare with full depth."""

    name: str
    options: dict[str, Any]


def run_exits(
    workload: Workload,
    checkpoint: str,
    *,
    errors: Sequence[float],
    prefill_shares: Sequence[float],
    residents: Sequence[int],
    rounds: int,
    min_seconds: float,
    num_threads: int,
    max_num_seqs: int,
) -> dict[str, Any]:
    """Compare the variants; returns the facts that are printed and written."""
    torch.set_num_threads(num_threads)
    routers = Routers.load(checkpoint)
    loaded = load(workload.model, dtype=workload.dtype)
    prompts = workload.token_ids(loaded)
    settings: dict[str, Any] = {
        "dtype": workload.dtype,
        "max_num_seqs": max(max_num_seqs, *residents) if residents else max_num_seqs,
        "max_model_len": max(
            max(map(len, prompts)) + workload.max_tokens,
            *(PROMPT_TOKENS + answer_room(count, DECODE_TOKENS) for count in residents),
            1,
        ),
        "kv_memory_fraction": 0.15,
        "num_threads": num_threads,
        "prefix_caching": False,  # every round asks the same prompts, and everyone must compute them
    }
    variants = [
        *(Variant(f"exits at {error:.0%} error", {"exit_error": error}) for error in errors),
        *(
            Variant(f"{share:.0%} of the prompt stops", {"policy": "full", "prefill_share": share})
            for share in prefill_shares
        ),
    ]
    full = TideEngine(loaded, EngineConfig(**settings))
    engines = [TideEngine(loaded, EngineConfig(**settings, exits=checkpoint, **v.options)) for v in variants]
    exiting = [Contender(variant.name, engine) for variant, engine in zip(variants, engines, strict=True)]
    everyone = [Contender("full depth", full), *exiting, Contender(AGAIN, full)]
    base = everyone[0], everyone[-1]
    answers = answer(full, prompts, workload.max_tokens)
    for number in range(rounds):
        for one in everyone if number % 2 == 0 else reversed(everyone):
            start = time.perf_counter()
            outputs = answer(one.engine, prompts, workload.max_tokens)
            one.rates.append(sum(map(len, outputs)) / (time.perf_counter() - start))
    again = follow(TideEngine(loaded, EngineConfig(**{**settings, "max_num_seqs": 24})), prompts, answers)
    rows = [_speed(base[0], base), {**_speed(base[1], base), "teacher_forced": _agreement(again)}]
    for variant, one in zip(variants, exiting, strict=True):
        quality = _quality(loaded, settings, checkpoint, variant, prompts, answers, workload.max_tokens)
        rows.append(_row(one, base, quality))
    speeds = [
        _at_residents(full, engines[: len(errors)], variants, prompts, count, rounds, min_seconds)
        for count in residents
    ]
    return {
        "model": workload.model,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "boundaries": list(routers.depths),
        "kv_policy": routers.facts.kv_policy,
        "prompts": len(prompts),
        "sources": workload.sources,
        "mean_prompt_tokens": round(statistics.mean(map(len, prompts)), 1),
        "max_tokens": workload.max_tokens,
        "rounds": rounds,
        "min_seconds": min_seconds,
        "max_num_seqs": full.max_num_seqs,
        "variants": rows,
        "residents": speeds,
    }


def _quality(
    loaded: LoadedModel,
    settings: dict[str, Any],
    checkpoint: str,
    variant: Variant,
    prompts: list[list[int]],
    answers: list[list[int]],
    max_tokens: int,
) -> dict[str, Any]:
    """Agreement with every boundary on, whether it pays here or not."""
    config = EngineConfig(**settings, exits=checkpoint, exits_when="always", **variant.options)
    engine = TideEngine(loaded, config)
    followed = follow(engine, prompts, answers)
    num_prompt = sum(map(len, prompts))
    stats = engine.stats
    depth = stats.sum_exit_layers / stats.num_generated_tokens
    exits = [n for n, b in zip(stats.rows_through_layer, stats.rows_through_layer[1:], strict=False) if n != b]
    free = answer(engine, prompts, max_tokens)
    return {
        "teacher_forced": _agreement(followed),
        "identical_answers": round(float(np.mean([a == b for a, b in zip(free, answers, strict=True)])), 4),
        "mean_depth": round(depth, 3),
        "boundaries_used": len(exits),
        "prompt_rows_stopped": round(stats.num_prefill_exits / (2 * num_prompt), 4),
    }


def _agreement(same: Sequence[Sequence[bool]]) -> list[float]:
    """Share of equal tokens, with a 95 % interval by prompts."""
    judged = [one for one in same if one]
    return [round(share, 4) for share in interval([float(np.mean(one)) for one in judged], list(map(len, judged)))]


def _speed(one: Contender, base: Sequence[Contender]) -> dict[str, Any]:
    return {
        "name": one.name,
        "tokens_per_second": round(one.rate, 1),
        "speedup": round(one.speedup(base), 3),
    }


def _row(one: Contender, base: Sequence[Contender], quality: dict[str, Any]) -> dict[str, Any]:
    described = one.engine.describe()["exits"]
    return {
        **_speed(one, base),
        "ceiling_in_layers": round(one.engine.num_layers / quality["mean_depth"], 3),
        **quality,
        "boundaries_on": described["boundaries_on"],
        "exit_shares": described["exit_shares"],
        "trials": described["trials"],
    }


def _at_residents(
    full: TideEngine,
    engines: Sequence[TideEngine],
    variants: Sequence[Variant],
    prompts: list[list[int]],
    residents: int,
    rounds: int,
    min_seconds: float,
) -> dict[str, Any]:
    """Decode rates with exactly this many residents: full depth, the exiting variants and full depth again, in turn."""
    everyone = [Contender("full depth", full)]
    everyone += [Contender(variant.name, engine) for variant, engine in zip(variants, engines, strict=False)]
    everyone.append(Contender(AGAIN, full))
    shorts = [prompts[n % len(prompts)][:PROMPT_TOKENS] for n in range(residents)]
    take_turns(everyone, shorts, DECODE_TOKENS, rounds, min_seconds)
    base = everyone[0], everyone[-1]
    return {
        "residents": residents,
        "tokens_per_second": {one.name: round(one.rate, 1) for one in everyone},
        "speedup": {one.name: round(one.speedup(base), 3) for one in everyone},
        "boundaries_on": {one.name: one.engine.describe()["exits"]["boundaries_on"] for one in everyone[1:-1]},
        "trials": {one.name: one.engine.describe()["exits"]["trials"] for one in everyone[1:-1]},
    }
