"""The CUDA kernel of ``route``.

A block takes ROUTE_ROWS rows and a slice of their channels, one unit of the bottleneck to a thread: a weight is read
once for all rows of the block. Blocks of the same rows leave partial products in memory and the last of them to finish
adds these up, always in the same order. Slices depend on the width alone, so that a row's score does not depend on the
rows beside it.
"""

from __future__ import annotations

import functools

import torch
from numba import cuda, float32, int32
from torch import Tensor

from tide_kernels.cuda.activations import reciprocal_root, sigmoid, silu
from tide_kernels.cuda.elements import elements, is_aligned
from tide_kernels.cuda.kernel import FLOAT, INT, Kernel, pointer, zeroed_counters
from tide_kernels.cuda.launches import (
    ROUTE_MIN_SLICE,
    ROUTE_ROWS,
    SPECIALISED_WIDTHS,
    whole_warps,
)
from tide_kernels.cuda.reductions import WARP, count_up, warp_sum
from tide_kernels.route import GateWeights, Normalisation

CHUNK = 64
"""Channels of a block's rows that lie in shared memory at a time."""


def route_cuda(
    states: Tensor, gate: GateWeights, thresholds: Tensor | None, features: Tensor | None, norm: Normalisation
) -> tuple[Tensor, Tensor]:
    """``route`` for checked arguments on a GPU."""
    states, down, up = states.contiguous(), gate.down.contiguous(), gate.up.contiguous()
    num_rows, width = states.shape
    tiles = -(-num_rows // ROUTE_ROWS)
    splits = max(1, width // ROUTE_MIN_SLICE)
    scores = torch.empty(num_rows, dtype=torch.float32, device=states.device)
    exits = torch.empty(num_rows, dtype=torch.bool, device=states.device)
    is_split = splits > 1
    size = splits * num_rows * gate.bottleneck if is_split else 1
    partial = torch.empty(size, dtype=torch.float32, device=states.device)
    traits = norm.kind, norm.weight is not None, norm.bias is not None
    kernel = route_kernel(
        states.dtype, width if width in SPECIALISED_WIDTHS and is_aligned(states) else 0, gate.bottleneck, *traits
    )
    kernel.launch(
        (tiles, splits),
        whole_warps(gate.bottleneck),
        states,
        states if norm.weight is None else norm.weight.contiguous(),
        states if norm.bias is None else norm.bias.contiguous(),
        down,
        gate.down_bias.contiguous(),
        up,
        gate.calibration.contiguous(),
        up if features is None else features.contiguous(),
        up if thresholds is None else thresholds.contiguous(),
        partial,
        zeroed_counters(states.device, tiles) if is_split else partial,
        scores,
        exits,
        num_rows,
        width,
        gate.num_features,
        int(thresholds is not None),
        norm.eps,
    )
    return scores, exits


@functools.cache
def route_kernel(
    dtype: torch.dtype, fixed_width: int, bottleneck: int, kind: str, has_weight: bool, has_bias: bool
) -> Kernel:
    """The kernel for one dtype and norm; ``fixed_width`` 0 takes any width."""
    is_normed, is_centred = kind != "none", kind == "layer"
    is_vector = fixed_width > 0
    numbers = elements(dtype, is_vector=is_vector)
    lanes, load, rounded, load_vector = numbers.lanes, numbers.load, numbers.rounded, numbers.load_vector
    rows, chunk = ROUTE_ROWS, CHUNK
    tile, warps = rows * chunk, whole_warps(bottleneck) // WARP
    row_parts = rows * warps

    @cuda.jit(device=True)
    def row_statistics(states, start, width, eps):  # type: ignore[no-untyped-def]
        """Mean (0 unless rows are centred) and reciprocal root mean square, by one warp."""
        values = cuda.local.array(lanes, float32)
        first = cuda.threadIdx.x % WARP * lanes
        mean = float32(0)
        if is_centred:
            for i in range(first, width, WARP * lanes):
                load_vector(states, start + i, values)
                for k in range(lanes):
                    mean += values[k]
            mean = warp_sum(mean) / float32(width)
        total = float32(0)
        for i in range(first, width, WARP * lanes):
            load_vector(states, start + i, values)
            for k in range(lanes):
                total += (values[k] - mean) * (values[k] - mean)
        return mean, reciprocal_root(warp_sum(total) / float32(width) + eps)

    def route_rows(  # type: ignore[no-untyped-def]
        states,
        norm_weight,
        norm_bias,
        down,
        down_bias,
        up,
        calibration,
        features,
        thresholds,
        partial,
        counters,
        scores,
        exits,
        num_rows,
        any_width,
        num_features,
        has_thresholds,
        eps,
    ):
        x = cuda.shared.array(tile, float32)
        means = cuda.shared.array(rows, float32)
        factors = cuda.shared.array(rows, float32)
        sums = cuda.shared.array(row_parts, float32)
        is_last = cuda.shared.array(1, int32)
        total = cuda.local.array(rows, float32)
        width = fixed_width if is_vector else any_width
        unit, threads = cuda.threadIdx.x, cuda.blockDim.x
        first = cuda.blockIdx.x * rows
        if is_normed:
            for r in range(unit // WARP, rows, warps):
                if first + r < num_rows:
                    mean, factor = row_statistics(states, (first + r) * width, width, eps)
                    if unit % WARP == 0:
                        means[r], factors[r] = mean, factor
        for r in range(rows):
            total[r] = float32(0)
        step = (width + cuda.gridDim.y - 1) // cuda.gridDim.y
        begin = cuda.blockIdx.y * step
        end = min(width, begin + step)
        for start in range(begin, end, chunk):
            cuda.syncthreads()  # the statistics are there; nobody reads the chunk before any more
            for i in range(unit, tile, threads):
                r, channel = i // chunk, start + i % chunk
                value = float32(0)
                if first + r < num_rows and channel < end:
                    value = load(states, (first + r) * width + channel)
                    if is_normed:
                        value = rounded((value - means[r]) * factors[r])
                    if has_weight:
                        value = rounded(value * load(norm_weight, channel))
                    if has_bias:
                        value = rounded(value + load(norm_bias, channel))
                x[i % chunk * rows + r] = value
            cuda.syncthreads()
            if unit < bottleneck:
                for k in range(min(chunk, end - start)):
                    weight = down[(start + k) * bottleneck + unit]
                    for r in range(rows):
                        total[r] += weight * x[k * rows + r]
        if cuda.gridDim.y > 1:
            if unit < bottleneck:
                for r in range(rows):
                    if first + r < num_rows:
                        partial[(cuda.blockIdx.y * num_rows + first + r) * bottleneck + unit] = total[r]
            cuda.threadfence()
            cuda.syncthreads()
            if unit == 0:
                is_last[0] = count_up(counters, cuda.blockIdx.x) == cuda.gridDim.y - 1
            cuda.syncthreads()
            if is_last[0] == 0:
                return
            cuda.threadfence()
            if unit == 0:
                counters[cuda.blockIdx.x] = 0
            for r in range(rows):
                total[r] = float32(0)
                if unit < bottleneck and first + r < num_rows:
                    for split in range(cuda.gridDim.y):
                        total[r] += partial[(split * num_rows + first + r) * bottleneck + unit]
        for r in range(rows):
            value = float32(0)
            if unit < bottleneck:
                value = silu(total[r] + down_bias[unit]) * up[unit]
            value = warp_sum(value)
            if unit % WARP == 0:
                sums[r * warps + unit // WARP] = value
        cuda.syncthreads()
        if unit < rows and first + unit < num_rows:
            row = first + unit
            logit = float32(0)
            for warp in range(warps):
                logit += sums[unit * warps + warp]
            for f in range(num_features):
                logit += features[row * num_features + f] * up[bottleneck + f]
            score = sigmoid((logit + calibration[0]) * calibration[1] + calibration[2])
            scores[row] = score
            exits[row] = 1 if has_thresholds != 0 and score >= thresholds[row] else 0

    wide, cells = pointer(torch.float32), pointer(dtype)
    inputs = cells, cells, cells, wide, wide, wide, wide, wide, wide
    outputs = wide, pointer(torch.int32), wide, pointer(torch.bool)
    return Kernel(route_rows, *inputs, *outputs, *[INT] * 4, FLOAT, max_threads=whole_warps(bottleneck))
