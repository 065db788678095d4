"""Everyone that answers offline prompts on this machine, in turn, on the same prompts and weights.

Our engine at full depth and with a router checkpoint, HuggingFace ``generate`` in static batches, ``generate_batch``,
and OpenVINO GenAI where it is installed: each at several batch sizes, of which its best one counts.
"""

from __future__ import annotations

import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bench_contenders import (
    BY_LENGTH,
    HF,
    OURS,
    Contender,
    agreement,
    engine_contenders,
    engine_settings,
    hf_contenders,
    take_turns,
    warm_engines,
    workload_facts,
)
from bench_openvino import OpenVinoPipeline, is_installed
from bench_roofline import roofline
from bench_workload import Workload

from tide_ray.models import LoadedModel, load
from tide_ray.models.demo import unpack_demo_gguf

WITH_EXITS, OPENVINO = "tide_ray, exits", "OpenVINO GenAI"


def run_peers(
    workload: Workload,
    *,
    checkpoint: str | None,
    gguf: str | None,
    rounds: int,
    engine_seqs: list[int],
    hf_batch_sizes: list[int],
    num_threads: int,
    with_hf_continuous: bool,
) -> dict[str, Any]:
    """Run everyone ``rounds`` times, interleaved; returns the facts that are printed and written.

    Args:
        checkpoint: routers for the engine with exits; None leaves it out.
        gguf: the file for OpenVINO; None takes the demo model's, and leaves OpenVINO out for other models.
    """
    torch.set_num_threads(num_threads)
    reference = load(workload.model, dtype=workload.dtype)
    prompts = workload.token_ids(reference)
    limits = roofline(reference, engine_seqs)
    settings = engine_settings(workload, prompts, num_threads)
    contenders = engine_contenders(OURS, warm_engines(workload, settings, engine_seqs), workload)
    if checkpoint is not None:
        with_exits = warm_engines(workload, {**settings, "exits": checkpoint}, engine_seqs)
        contenders += engine_contenders(WITH_EXITS, with_exits, workload)
    contenders += hf_contenders(reference, workload, prompts, hf_batch_sizes, with_continuous=with_hf_continuous)
    with tempfile.TemporaryDirectory() as scratch:
        contenders += _openvino(reference, workload, prompts, gguf, Path(scratch), engine_seqs, num_threads)
    take_turns(contenders, rounds, num_threads)
    best = _best(contenders)
    ours, base = best[OURS], best[HF].tokens_per_second
    return {
        "rounds": rounds,
        **workload_facts(workload, reference, prompts),
        "checkpoint": Path(checkpoint).name if checkpoint else None,
        "openvino": version("openvino-genai") if OPENVINO in best else None,
        "roofline": limits,
        "contenders": [contender.facts(base) for contender in contenders],
        "ratios": {name: round(ours.tokens_per_second / one.tokens_per_second, 2) for name, one in best.items()},
        "roofline_share": round(ours.tokens_per_second / limits["tokens_per_second"][str(ours.batch_size)], 3),
        "agreement_with_hf": agreement(ours.answers, best[HF].answers),
    }


def _openvino(
    reference: LoadedModel,
    workload: Workload,
    prompts: list[list[int]],
    gguf: str | None,
    scratch: Path,
    batch_sizes: list[int],
    num_threads: int,
) -> list[Contender]:
    if not is_installed() or (gguf is None and workload.model != "demo"):
        return []
    pipeline = OpenVinoPipeline(
        Path(gguf) if gguf is not None else unpack_demo_gguf(scratch),
        dtype=str(reference.dtype).removeprefix("torch."),
        max_num_seqs=max(batch_sizes),
        num_threads=num_threads,
    )
    eos = set(reference.eos_token_ids)
    pipeline.answers(prompts[:4], 4, eos, 4)
    return [
        Contender(OPENVINO, size, partial(pipeline.answers, prompts, workload.max_tokens, eos, size))
        for size in batch_sizes
    ]


def _best(contenders: list[Contender]) -> dict[str, Contender]:
    """Everyone's fastest batch size; sorting by length counts as a way to run HF ``generate``."""
    best: dict[str, Contender] = {}
    for contender in contenders:
        name = contender.name.removesuffix(BY_LENGTH)
        if name not in best or contender.tokens_per_second > best[name].tokens_per_second:
            best[name] = contender
    return best
