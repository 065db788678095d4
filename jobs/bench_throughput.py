"""The throughput benchmark's contenders and rounds. Every figure is generated tokens (EOS included) per second.

The engine's time includes prompts to token ids and answers to text; HuggingFace is given token ids and asked for them.
"""

from __future__ import annotations

import gc
import statistics
from functools import partial
from typing import Any

import torch
from bench_contenders import Contender, engine_answers, hf_contenders
from bench_hf import static_batches
from bench_profile import profile_engine
from bench_workload import Workload

from tide_ray import EngineConfig, TideEngine
from tide_ray.models import load

# Every engine is in memory at once, beside HuggingFace's model and its cache.
KV_MEMORY_FRACTION = 0.2


def run_throughput(
    workload: Workload,
    *,
    rounds: int,
    engine_seqs: list[int],
    hf_batch_sizes: list[int],
    num_threads: int,
    with_hf_continuous: bool,
    with_ray: bool,
) -> dict[str, Any]:
    """Run everything; returns the facts that are printed and written."""
    torch.set_num_threads(num_threads)
    facts, engine_settings = _compare(
        workload, rounds, engine_seqs, hf_batch_sizes, num_threads, with_hf_continuous=with_hf_continuous
    )
    if with_ray:
        from bench_ray import ray_overhead

        gc.collect()  # the engines are gone: the job's engine must have the machine's memory to itself
        facts["ray"] = ray_overhead(workload, engine_settings, rounds)
    return {"rounds": rounds, **facts}


def _compare(
    workload: Workload,
    rounds: int,
    engine_seqs: list[int],
    hf_batch_sizes: list[int],
    num_threads: int,
    *,
    with_hf_continuous: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The in-process part's facts, and the settings of the engine that was fastest."""
    reference = load(workload.model, dtype=workload.dtype)
    prompts = workload.token_ids(reference)
    settings: dict[str, Any] = {
        "dtype": workload.dtype,
        "max_model_len": max(map(len, prompts)) + workload.max_tokens,
        "num_threads": num_threads,
    }
    engines = [
        TideEngine.from_pretrained(
            workload.model, EngineConfig(**settings, max_num_seqs=seqs, kv_memory_fraction=KV_MEMORY_FRACTION)
        )
        for seqs in engine_seqs
    ]
    ours = [
        Contender("tide_ray, full depth", engine.max_num_seqs, partial(engine_answers, engine, workload))
        for engine in engines
    ]
    theirs = hf_contenders(reference, workload, prompts, hf_batch_sizes, with_continuous=with_hf_continuous)
    for engine in engines:
        engine.warm_up()
    static_batches(reference, prompts[:4], 4, 4, False)
    for _ in range(rounds):
        for contender in (*ours, *theirs):
            torch.set_num_threads(num_threads)  # the contender before may have left another number
            contender.measure()
    best_ours, best_hf = (max(group, key=lambda c: c.tokens_per_second) for group in (ours, theirs))
    base = best_hf.tokens_per_second
    best = engines[ours.index(best_ours)]
    facts = {
        "model": workload.model,
        "dtype": str(reference.dtype).removeprefix("torch."),
        "hf_attention": reference.model.config._attn_implementation,
        "prompts": len(prompts),
        "sources": workload.sources,
        "mean_prompt_tokens": round(statistics.mean(map(len, prompts)), 1),
        "max_tokens": workload.max_tokens,
        "contenders": [contender.facts(base) for contender in (*ours, *theirs)],
        "ratio": best_ours.facts(base)["ratio_to_best_hf"],
        "best": best_ours.batch_size,
        "best_hf": best_hf.name,
        "agreement_with_hf": agreement(best_ours.answers, best_hf.answers),
        "profile": profile_engine(best, best_ours.run),
        "engine": best.describe(),
        "num_preemptions": best.stats.num_preemptions,
    }
    return facts, {**settings, "max_num_seqs": best.max_num_seqs}


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> dict[str, float]:
    """Share of identical answers, and of HF's tokens before the first difference.

    In bfloat16 rounding alone separates two batch compositions of the same model, HF's own included.
    """
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    common = 0
    for a, b in zip(ours, theirs, strict=True):
        pairs = enumerate(zip(a, b, strict=False))
        common += next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
    return {
        "identical_answers": round(same / len(theirs), 3),
        "tokens_before_difference": round(common / sum(map(len, theirs)), 3),
    }
