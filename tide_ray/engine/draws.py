"""One index out of each row of numbers: of the largest, or drawn by the inverse CDF in column order.

The uniform number for a draw depends on (seed, position) only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from tide_kernels.sample import random_bits

UINT64_MASK = 2**64 - 1
BLOCK = 256


def uniform(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """One float64 in [0, 1) for each (seed, position), the same whatever else is asked for.

    The bits are those of ``random_bits``, the generator that the GPU kernel draws from as well.
    """
    seed = np.array([s & UINT64_MASK for s in seeds], dtype=np.uint64)
    position = np.array([p & UINT64_MASK for p in positions], dtype=np.uint64)
    return (random_bits(seed, position) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Inverse CDF: the first column whose cumulative weight exceeds ``uniform * total``, never one of weight 0.

    Args:
        weights: [r, C], not negative, not normalised.
        uniforms: [r] float64 in [0, 1).

    Returns:
        Column indices [r]. Two levels (blocks, then within one block) keep the float64 work small.
    """
    num_columns = weights.shape[1]
    num_blocks = -(-num_columns // BLOCK)
    weights = torch.nn.functional.pad(weights, (0, num_blocks * BLOCK - num_columns))
    blocks = weights.view(len(weights), num_blocks, BLOCK)
    reached = blocks.sum(dim=-1).cumsum(dim=-1, dtype=torch.float64)
    target = (uniforms * reached[:, -1])[:, None]
    block = _first_above(reached, target)
    target = target - torch.where(block > 0, reached.gather(1, (block - 1).clamp_min(0)), 0.0)
    inner = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].cumsum(dim=-1, dtype=torch.float64)
    column = block * BLOCK + _first_above(inner, target)
    return column[:, 0].clamp_max(num_columns - 1)  # out of range only for a row of NaN, which must not fail the batch


def _first_above(reached: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """First column of a cumulative sum [r, C] above ``target`` [r, 1], else (rounding at u ~ 1) the last that grew."""
    column = torch.searchsorted(reached, target, right=True)
    last = torch.searchsorted(reached, reached[:, -1:].contiguous())
    return torch.minimum(column, last).clamp_max(reached.shape[1] - 1)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """First index of each row's largest value, [R, V] -> [R]; in two levels, as torch's is slow on bfloat16."""
    width = math.gcd(logits.shape[1], BLOCK)
    blocks = logits.reshape(len(logits), logits.shape[1] // width, width)
    best = blocks.amax(dim=-1).argmax(dim=-1)
    return best * width + blocks[torch.arange(len(blocks), device=logits.device), best].argmax(dim=-1)
