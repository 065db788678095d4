"""Who answers a workload, and how fast: our engine, and HuggingFace's generation in its several ways."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from bench_hf import continuous_batching, static_batches
from bench_workload import Workload

from tide_ray import EngineConfig, TideEngine
from tide_ray.models import LoadedModel, load

# Every engine is in memory at once, beside HuggingFace's model and its cache.
KV_MEMORY_FRACTION = 0.2
OURS, HF, BY_LENGTH = "tide_ray, full depth", "HF generate", ", sorted by length"


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


def hf_contenders(
    reference: LoadedModel,
    workload: Workload,
    prompts: list[list[int]],
    batch_sizes: list[int],
    *,
    with_continuous: bool,
) -> list[Contender]:
    """Static batches in the given order, and sorted by length where that changes a batch; one has run to warm up."""
    static_batches(reference, prompts[:4], 4, 4, False)
    contenders = [
        Contender(
            f"{HF}{BY_LENGTH if by_length else ''}",
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


def engine_settings(workload: Workload, prompts: list[list[int]], num_threads: int) -> dict[str, Any]:
    """EngineConfig fields that fit the workload; ``prompts`` are its token ids.

    Every round asks the same prompts, so a prefix cache would answer what is to be measured.
    """
    return {
        "prefix_caching": False,
        "dtype": workload.dtype,
        "max_model_len": max(map(len, prompts)) + workload.max_tokens,
        "num_threads": num_threads,
    }


def warm_engines(workload: Workload, settings: dict[str, Any], engine_seqs: list[int]) -> list[TideEngine]:
    """An engine for each number of resident sequences."""
    engines = []
    for seqs in engine_seqs:
        config = EngineConfig(**settings, max_num_seqs=seqs, kv_memory_fraction=KV_MEMORY_FRACTION)
        engines.append(TideEngine.from_pretrained(workload.model, config))
        engines[-1].warm_up()
    return engines


def engine_contenders(name: str, engines: list[TideEngine], workload: Workload) -> list[Contender]:
    return [Contender(name, engine.max_num_seqs, partial(_answers, engine, workload)) for engine in engines]


def _answers(engine: TideEngine, workload: Workload) -> list[list[int]]:
    outputs = engine.generate(workload.prompts(engine.tokenizer), workload.params())
    return [output.outputs[0].token_ids for output in outputs]


def take_turns(contenders: list[Contender], rounds: int, num_threads: int) -> None:
    """Measure everyone ``rounds`` times, interleaved."""
    for _ in range(rounds):
        for contender in contenders:
            torch.set_num_threads(num_threads)  # the contender before may have left another number
            contender.measure()


def workload_facts(workload: Workload, reference: LoadedModel, prompts: list[list[int]]) -> dict[str, Any]:
    """What was asked, and of which model."""
    return {
        "model": workload.model,
        "dtype": str(reference.dtype).removeprefix("torch."),
        "prompts": len(prompts),
        "sources": workload.sources,
        "mean_prompt_tokens": round(statistics.mean(map(len, prompts)), 1),
        "max_tokens": workload.max_tokens,
    }


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
