"""Decoding at full depth with a given number of residents: the engine, HF ``generate``, and what the machine allows.

Only steps that decode are timed, from prompts of a given length on, so that rates compare with the roofline: weights
read once a step and every row's K/V once, at the measured rate of copies.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from bench_depth import all_decoding, answer_room, decode_rate, random_prompts, tokens_each
from bench_roofline import roofline
from bench_shapes import open_model
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from tide_ray import EngineConfig, TideEngine
from tide_ray.engine.kv_cache import page_bytes
from tide_ray.models import LoadedModel
from tide_ray.models.adapter import Adapter

OURS, HF, HF_COMPILED = "tide_ray", "HF generate", "HF generate, static cache, compiled"
PROFILED_STEPS = 6
PROFILE_LINES = 14


@dataclass(slots=True)
class _Decoder:
    name: str
    run: Callable[[list[list[int]]], float]
    rates: list[float] = field(default_factory=list)


def run_decode(
    *,
    model: str,
    dtype: str,
    residents: Sequence[int],
    prompt_tokens: int,
    tokens: int,
    rounds: int,
    hf: str,
    num_threads: int,
) -> dict[str, Any]:
    """Measure every number of residents; returns the facts that are printed and written.

    Args:
        hf: ``none``; ``eager``: HF ``generate`` as well; ``compiled``: with a static cache, too, whose compilation
            takes a minute for each number of residents.
    """
    torch.set_num_threads(num_threads)
    loaded = open_model(model, dtype=dtype)
    num_bytes = page_bytes(Adapter(loaded.model).kv_shapes, 1, loaded.dtype) * (prompt_tokens + tokens // 2)
    limits = roofline(loaded, list(residents), kv_bytes=num_bytes)
    peers = _peers(open_model(model, dtype=dtype), hf, tokens) if hf != "none" else []
    engine = TideEngine(
        loaded,
        EngineConfig(
            dtype=dtype,
            num_threads=num_threads,
            max_num_seqs=max(residents),
            max_model_len=prompt_tokens + max(answer_room(count, tokens) for count in residents),
            kv_memory_fraction=0.6,
            prefix_caching=False,
        ),
    )
    engine.warm_up()
    rows = []
    for count in residents:
        prompts = random_prompts(count, engine.runner.adapter.config.vocab_size, prompt_tokens)
        ours = _Decoder(OURS, lambda prompts: decode_rate(engine, prompts, tokens))
        decoders = [ours, *(_Decoder(name, run) for name, run in peers)]
        for decoder in decoders[1:]:
            decoder.run(prompts)  # compiles where it does
        for _ in range(rounds):
            for decoder in decoders:
                decoder.rates.append(decoder.run(prompts))
        rate = {decoder.name: statistics.median(decoder.rates) for decoder in decoders}
        rows.append(
            {
                "residents": count,
                "tokens_per_second": {name: round(value, 1) for name, value in rate.items()},
                "spread": {d.name: [round(min(d.rates), 1), round(max(d.rates), 1)] for d in decoders},
                "ratios": {name: round(rate[OURS] / value, 2) for name, value in rate.items()},
                "roofline_share": round(rate[OURS] / limits["tokens_per_second"][str(count)], 3),
                "profile": _profile(engine, prompts) if loaded.device.type == "cuda" else None,
            }
        )
    return {
        "model": model,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "prompt_tokens": prompt_tokens,
        "tokens_per_resident": tokens,
        "rounds": rounds,
        "async_scheduling": engine.runs_ahead,
        "cuda_graphs": engine.describe()["cuda_graphs"],
        "roofline": limits,
        "rows": rows,
    }


def _peers(loaded: LoadedModel, hf: str, tokens: int) -> list[tuple[str, Callable[[list[list[int]]], float]]]:
    peers: list[tuple[str, Callable[[list[list[int]]], float]]] = [
        (HF, lambda prompts: _hf_rate(loaded, prompts, tokens, {}))
    ]
    if hf == "compiled":
        peers.append(
            (HF_COMPILED, lambda prompts: _hf_rate(loaded, prompts, tokens, {"cache_implementation": "static"}))
        )
    return peers


class _Clock(StoppingCriteria):
    """When the first token was there, and the last: HF waits for the device after each."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def _hf_rate(loaded: LoadedModel, prompts: list[list[int]], tokens: int, options: dict[str, Any]) -> float:
    """Tokens per second from the first new token on."""
    count = tokens_each(len(prompts), tokens) + 1
    ids = torch.tensor(prompts, device=loaded.device)
    clock = _Clock()
    settings = GenerationConfig(
        max_new_tokens=count, min_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    )
    loaded.model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=settings,
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    return len(prompts) * (len(clock.times) - 1) / (clock.times[-1] - clock.times[0])


def _profile(engine: TideEngine, prompts: list[list[int]]) -> dict[str, Any]:
    """Where a step's time goes: the longest kernels and all of them in microseconds a step, beside the step's."""
    spent: dict[str, float] = defaultdict(float)
    with all_decoding(engine, prompts, 4 * PROFILED_STEPS):
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            start = time.perf_counter()
            for _ in range(PROFILED_STEPS):
                engine.step()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
    for event in profiler.events():
        if event.device_type.name == "CUDA":
            spent[event.name] += event.device_time_total
    longest = sorted(spent.items(), key=lambda item: -item[1])[:PROFILE_LINES]
    return {
        "step_us": round(seconds / PROFILED_STEPS * 1e6, 1),
        "all_kernels_us": round(sum(spent.values()) / PROFILED_STEPS, 1),
        "kernels_us": {name[:80]: round(us / PROFILED_STEPS, 1) for name, us in longest},
    }
