"""Who answers a workload, and how fast: our engine, and HuggingFace's generation in its several ways."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bench_hf import continuous_batching, static_batches
from bench_workload import Workload

from tide_ray import TideEngine
from tide_ray.models import LoadedModel, load


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


def engine_answers(engine: TideEngine, workload: Workload) -> list[list[int]]:
    outputs = engine.generate(workload.prompts(engine.tokenizer), workload.params())
    return [output.outputs[0].token_ids for output in outputs]
