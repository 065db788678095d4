"""The throughput benchmark's contenders and rounds. Every figure is generated tokens (EOS included) per second.

The engine's time includes prompts to token ids and answers to text; HuggingFace is given token ids and asked for them.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from bench_hf import continuous_batching, static_batches
from bench_profile import profile_engine
from bench_workload import Workload

from tide_ray import EngineConfig, TideEngine
from tide_ray.models import LoadedModel, load

# Every engine is in memory at once, beside HuggingFace's model and its cache.
KV_MEMORY_FRACTION = 0.2


@dataclass(slots=True)
class Contender:
    """Something that answers the workload; ``run`` returns the tokens of every answer, in the workload's order."""

    name: str
    batch_size: int | None
    run: Callable[[], list[list[int]]]
    seconds: list[float] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)

    def measure(self) -> None:
        start = time.perf_counter()
        self.answers = self.run()
        self.seconds.append(time.perf_counter() - start)

    @property
    def tokens_per_second(self) -> float:
        """Median over the rounds."""
        return round(statistics.median(self._rates()), 1)

    def _rates(self) -> list[float]:
        num_tokens = sum(map(len, self.answers))
        return [num_tokens / seconds for seconds in self.seconds]

    def facts(self, base: float) -> dict[str, Any]:
        rates = self._rates()
        return {
            "name": self.name,
            "batch_size": self.batch_size,
            "tokens": sum(map(len, self.answers)),
            "tokens_per_second": self.tokens_per_second,
            "slowest": round(min(rates), 1),
            "fastest": round(max(rates), 1),
            "ratio_to_best_hf": round(self.tokens_per_second / base, 2),
        }


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
        Contender("tide_ray, full depth", engine.max_num_seqs, partial(_answers, engine, workload))
        for engine in engines
    ]
    theirs = _hf_contenders(reference, workload, prompts, hf_batch_sizes, with_continuous=with_hf_continuous)
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


def _hf_contenders(
    reference: LoadedModel,
    workload: Workload,
    prompts: list[list[int]],
    batch_sizes: list[int],
    *,
    with_continuous: bool,
) -> list[Contender]:
    """Static batches in the given order, and sorted by length where that changes a batch."""
    contenders = [
        Contender(
            f"HF generate{', sorted by length' if by_length else ''}",
            size,
            partial(static_batches, reference, prompts, workload.max_tokens, size, by_length),
        )
        for size in batch_sizes
        for by_length in ((False, True) if size < len(prompts) else (False,))
    ]
    if with_continuous:
        own = load(workload.model, dtype=workload.dtype)
        continuous_batching(own, prompts[:4], 4)
        contenders.append(
            Contender("HF generate_batch", None, partial(continuous_batching, own, prompts, workload.max_tokens))
        )
    return contenders


def _answers(engine: TideEngine, workload: Workload) -> list[list[int]]:
    outputs = engine.generate(workload.prompts(engine.tokenizer), workload.params())
    return [output.outputs[0].token_ids for output in outputs]


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
