"""Chooses a token for every row of logits in one launch, without asking the host: greedy, or a draw after temperature,
top_k, top_p and min_p, in that order.

A draw is the inverse CDF in token-id order at random bits that depend on (seed, position) only. Weights are integers,
in units of 2**-40 of the likeliest token's, so that sums do not depend on their order and a row gets the same token
alone or in any batch. Equally likely tokens are kept or dropped together. ``sample_tokens`` chooses: the CUDA kernel on
GPUs, ``sample_tokens_reference`` elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from tide_kernels import gpu

MIN_TEMPERATURE = 1e-6
WEIGHT_UNITS = 2.0**40
"""Of the likeliest token; sums over 2**17 tokens stay below 2**57."""
SHARE_BITS = 31
"""top_p is a whole number of 2**-31."""

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_UINT64_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SamplingRules:
    """How each of N rows is sampled; all ``[N]`` on the device of the logits.

    temperatures: float32, 0 for greedy; top_ks: int32, 0 for all tokens; top_ps: float32, 1 for all; min_ps: float32;
    seeds, positions: int64, the bits of any 64-bit numbers.
    """

    temperatures: Tensor
    top_ks: Tensor
    top_ps: Tensor
    min_ps: Tensor
    seeds: Tensor
    positions: Tensor


def sample_tokens(logits: Tensor, rules: SamplingRules) -> Tensor:
    """One token id per row.

    Args:
        logits: float32, float16 or bfloat16 ``[N, V]``; NaN is never chosen.

    Returns:
        long ``[N]``; 0 for a row in which nothing can be chosen.

    Raises:
        ValueError: shapes or dtypes do not fit together.
    """
    _check(logits, rules)
    if gpu.run_on(logits, *(getattr(rules, field.name) for field in fields(rules))):
        from tide_kernels.cuda.sample import sample_cuda

        return sample_cuda(logits, rules)
    return sample_tokens_reference(logits, rules)


def sample_tokens_reference(logits: Tensor, rules: SamplingRules) -> Tensor:
    """``sample_tokens`` in torch, row by row."""
    seeds, positions = (bits.cpu().numpy().view(np.uint64) for bits in (rules.seeds, rules.positions))
    draws = random_bits(seeds, positions).tolist()
    knobs = (t.tolist() for t in (rules.temperatures, rules.top_ks, rules.top_ps, rules.min_ps))
    chosen = [_choose(*row) for row in zip(logits.float(), *knobs, draws, strict=True)]
    return torch.tensor(chosen, dtype=torch.long, device=logits.device)


def random_bits(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """64 random bits for each (seed, position), uint64, the same whatever else is asked for.

    SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014) as a counter-based
    generator: the seed is mixed into a key first, so that streams of neighbouring seeds do not overlap.
    """
    key = _mix64(seeds + GOLDEN_GAMMA)
    return _mix64(key + (positions + np.uint64(1)) * GOLDEN_GAMMA)


def _mix64(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * MIX[0]
    z = (z ^ (z >> np.uint64(27))) * MIX[1]
    return z ^ (z >> np.uint64(31))


def _choose(row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, draw: int) -> int:
    row = row.nan_to_num(float("-inf"), float("inf"), float("-inf"))
    best = row.max()
    if temperature <= 0 or not bool(best.isfinite()):
        return int(row.argmax())
    distances = (best - row) / max(temperature, MIN_TEMPERATURE)
    weights = torch.exp(-distances)
    units = (weights * WEIGHT_UNITS).long()
    kept = torch.ones_like(row, dtype=torch.bool)
    if 0 < top_k < len(row):
        kept = distances <= distances.sort().values[top_k - 1]
    if top_p < 1:
        order = torch.argsort(distances, stable=True)
        reached = (units * kept)[order].cumsum(0)
        share = int(np.float32(top_p) * np.float32(2**SHARE_BITS))
        needed = -(-int(reached[-1]) * share >> SHARE_BITS)  # rounded up
        last = int(torch.searchsorted(reached, max(needed, 1)))
        kept &= distances <= distances[order][min(last, len(row) - 1)]
    reached = (units * (kept & (weights >= min_p))).cumsum(0)
    if not reached[-1]:
        return int(row.argmax())
    return int(torch.searchsorted(reached, draw * int(reached[-1]) >> 64, right=True))


def _check(logits: Tensor, rules: SamplingRules) -> None:
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [N, V], got {tuple(logits.shape)}")
    wanted = {"top_ks": torch.int32, "seeds": torch.int64, "positions": torch.int64}
    for field in fields(rules):
        values: Tensor = getattr(rules, field.name)
        dtype = wanted.get(field.name, torch.float32)
        if values.shape != logits.shape[:1] or values.dtype != dtype:
            raise ValueError(
                f"{field.name} must be {str(dtype).removeprefix('torch.')} [{len(logits)}], got {values.dtype} "
                f"{tuple(values.shape)}"
            )
