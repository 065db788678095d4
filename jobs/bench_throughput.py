"""The throughput benchmark's contenders and rounds. Every figure is generated tokens (EOS included) per second.

The engine's time includes prompts to token ids and answers to text; HuggingFace is given token ids and asked for them.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from bench_contenders import (
    OURS,
    agreement,
    engine_contenders,
    engine_settings,
    hf_contenders,
    take_turns,
    warm_engines,
    workload_facts,
)
from bench_profile import profile_engine
from bench_workload import Workload

from tide_ray.models import load


def run_throughput(
    workload: Workload,
    *,
    rounds: int,
    engine_seqs: list[int],
    hf_batch_sizes: list[int],
    num_threads: int,
    with_hf_continuous: bool,
    ray_repeats: int,
) -> dict[str, Any]:
    """Run everything; returns the facts that are printed and written.

    Args:
        ray_repeats: times that the Ray comparison asks every prompt; 0 leaves it out.
    """
    torch.set_num_threads(num_threads)
    facts, settings = _compare(
        workload, rounds, engine_seqs, hf_batch_sizes, num_threads, with_hf_continuous=with_hf_continuous
    )
    if ray_repeats:
        from bench_ray import ray_overhead

        gc.collect()  # the engines are gone: the job's engine must have the machine's memory to itself
        facts["ray"] = ray_overhead(workload, settings, rounds=rounds, repeats=ray_repeats)
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
    settings = engine_settings(workload, prompts, num_threads)
    engines = warm_engines(workload, settings, engine_seqs)
    ours = engine_contenders(OURS, engines, workload)
    plain = []
    if reference.device.type == "cuda":
        in_turn = warm_engines(workload, {**settings, "cuda_graphs": "off", "async_scheduling": "off"}, engine_seqs)
        plain = engine_contenders(f"{OURS}, no CUDA graphs, steps in turn", in_turn, workload)
    theirs = hf_contenders(reference, workload, prompts, hf_batch_sizes, with_continuous=with_hf_continuous)
    take_turns([*ours, *plain, *theirs], rounds, num_threads)
    best_ours, best_hf = (max(group, key=lambda c: c.tokens_per_second) for group in (ours, theirs))
    base = best_hf.tokens_per_second
    best = engines[ours.index(best_ours)]
    facts = {
        **workload_facts(workload, reference, prompts),
        "hf_attention": reference.model.config._attn_implementation,
        "contenders": [contender.facts(base) for contender in (*ours, *plain, *theirs)],
        "ratio": best_ours.facts(base)["ratio_to_best_hf"],
        "best": best_ours.batch_size,
        "best_hf": best_hf.name,
        "agreement_with_hf": agreement(best_ours.answers, best_hf.answers),
        "profile": profile_engine(best, best_ours.run),
        "engine": best.describe(),
        "num_preemptions": best.stats.num_preemptions,
    }
    return facts, {**settings, "max_num_seqs": best.max_num_seqs}
