"""The CUDA kernel of ``sample_tokens``: a block to a row.

top_k and top_p keep the tokens up to some distance from the best one. That distance is found without sorting: its bits,
which order as integers do, are read off in three digits, from histograms of how many tokens, or how much weight, each
value of the digit holds. Each warp draws within its own part of the vocabulary.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from numba import cuda, float32, int32, int64, uint32, uint64
from torch import Tensor

from tide_kernels.cuda.activations import exp
from tide_kernels.cuda.elements import bits_of, elements, is_aligned
from tide_kernels.cuda.kernel import INT, LONG, Kernel, pointer
from tide_kernels.cuda.launches import SAMPLE_THREADS
from tide_kernels.cuda.reductions import ALL_LANES, WARP, warp_sum
from tide_kernels.sample import GOLDEN_GAMMA, MIN_TEMPERATURE, MIX, SHARE_BITS, WEIGHT_UNITS, SamplingRules

DIGITS = ((21, 11), (10, 11), (0, 10))
"""Lowest bit and width of each digit of a distance."""
BINS = 2**11
BINS_PER_LANE = BINS // WARP
EVERYTHING = np.uint32(0xFFFFFFFF)
MIX_ONE, MIX_TWO = MIX
LOW = np.uint64(0xFFFFFFFF)


def sample_cuda(logits: Tensor, rules: SamplingRules) -> Tensor:
    """``sample_tokens`` for checked arguments on a GPU."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    lanes = elements(logits.dtype).lanes
    is_vector = logits.shape[1] % lanes == 0 and logits.stride(0) % lanes == 0 and is_aligned(logits)
    chosen = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    sample_kernel(logits.dtype, SAMPLE_THREADS, is_vector=is_vector).launch(
        (len(logits),),
        SAMPLE_THREADS,
        logits,
        rules.temperatures.contiguous(),
        rules.top_ks.contiguous(),
        rules.top_ps.contiguous(),
        rules.min_ps.contiguous(),
        rules.seeds.contiguous().view(torch.uint64),
        rules.positions.contiguous().view(torch.uint64),
        chosen,
        logits.shape[1],
        logits.stride(0),
    )
    return chosen


@cuda.jit(device=True)
def mixed(z):  # type: ignore[no-untyped-def]
    z = uint64((z ^ (z >> uint64(30))) * MIX_ONE)
    z = uint64((z ^ (z >> uint64(27))) * MIX_TWO)
    return z ^ (z >> uint64(31))


@cuda.jit(device=True)
def scaled(draw, total):  # type: ignore[no-untyped-def]
    """``draw * total / 2**64``, rounded down, for a total below 2**63."""
    low, high, total = draw & LOW, draw >> uint64(32), uint64(total)
    total_low, total_high = total & LOW, total >> uint64(32)
    cross_a, cross_b = high * total_low, low * total_high
    carry = ((low * total_low) >> uint64(32)) + (cross_a & LOW) + (cross_b & LOW)
    parts = (cross_a >> uint64(32)) + (cross_b >> uint64(32)) + (carry >> uint64(32))
    return int64(high * total_high + parts)


@cuda.jit(device=True)
def share_of(total, share):  # type: ignore[no-untyped-def]
    """``total * share / 2**SHARE_BITS``, rounded up."""
    part = (total & int64(0xFFFFFFFF)) * share
    whole = (total >> int64(32)) * (share << int64(32 - SHARE_BITS)) + (part >> int64(SHARE_BITS))
    return whole + (1 if part & int64(2**SHARE_BITS - 1) else 0)


@cuda.jit(device=True)
def sum_before(value, lane):  # type: ignore[no-untyped-def]
    """The sum of this lane's value and those of the lanes before."""
    for far in (1, 2, 4, 8, 16):
        other = cuda.shfl_up_sync(ALL_LANES, value, far)
        if lane >= far:
            value += other
    return value


@functools.cache
def sample_kernel(dtype: torch.dtype, threads: int, *, is_vector: bool) -> Kernel:
    """The kernel for one dtype."""
    numbers = elements(dtype, is_vector=is_vector)
    lanes, load_vector = numbers.lanes, numbers.load_vector
    warps, step, warp_step = threads // WARP, threads * lanes, WARP * lanes
    never = float32(-math.inf)

    @cuda.jit(device=True)
    def units_of(distance):  # type: ignore[no-untyped-def]
        """A token's weight; not a number has none."""
        return int64(exp(-distance) * float32(WEIGHT_UNITS)) if distance >= float32(0) else int64(0)

    @cuda.jit(device=True)
    def best_of_row(logits, start, num_tokens, values, peaks, places):  # type: ignore[no-untyped-def]
        """The largest number of a row and its first place."""
        thread = cuda.threadIdx.x
        best, place = never, int32(num_tokens)
        for first in range(thread * lanes, num_tokens, step):
            load_vector(logits, start + first, values)
            for k in range(lanes):
                if values[k] > best:
                    best, place = values[k], int32(first + k)
        for far in (16, 8, 4, 2, 1):
            other, there = cuda.shfl_xor_sync(ALL_LANES, best, far), cuda.shfl_xor_sync(ALL_LANES, place, far)
            if other > best or (other == best and there < place):
                best, place = other, there
        if thread % WARP == 0:
            peaks[thread // WARP], places[thread // WARP] = best, place
        cuda.syncthreads()
        for warp in range(warps):
            other, there = peaks[warp], places[warp]
            if other > best or (other == best and there < place):
                best, place = other, there
        return best, place

    @cuda.jit(device=True)
    def find_bin(bins, found):  # type: ignore[no-untyped-def]
        """By the first warp: the first bin with which the sum of bins reaches ``found[0]``, and what is left of that.

        They are put into ``found``: the sum still to reach within the bin, and the bin, or -1 where all bins are less.
        """
        lane = cuda.threadIdx.x
        mine = int64(0)
        for k in range(BINS_PER_LANE):
            mine += bins[lane * BINS_PER_LANE + k]
        target = found[0]
        reached = sum_before(mine, lane)
        cuda.syncwarp()
        if lane == WARP - 1 and reached < target:
            found[1] = -1
        if reached - mine < target <= reached:
            left = target - (reached - mine)
            number = lane * BINS_PER_LANE
            while bins[number] < left:
                left -= bins[number]
                number += 1
            found[0], found[1] = left, number

    @cuda.jit(device=True)
    def find_limit(logits, start, num_tokens, best, heat, by_weight, limit, target, values, bins, found):  # type: ignore[no-untyped-def]
        """The distance, as bits, up to which tokens have to be kept so that their number or weight reaches ``target``;
        among those up to ``limit``."""
        thread = cuda.threadIdx.x
        prefix, known = uint32(0), uint32(0)
        if thread == 0:
            found[0] = target
        for low, size in DIGITS:
            cuda.syncthreads()
            for i in range(thread, BINS, threads):
                bins[i] = 0
            cuda.syncthreads()
            for first in range(thread * lanes, num_tokens, step):
                load_vector(logits, start + first, values)
                for k in range(lanes):
                    distance = (best - values[k]) / heat
                    key = bits_of(distance)
                    if distance >= float32(0) and key <= limit and (key & known) == prefix:
                        digit = int32((key >> uint32(low)) & uint32((1 << size) - 1))
                        cuda.atomic.add(bins, digit, units_of(distance) if by_weight else int64(1))
            cuda.syncthreads()
            if thread < WARP:
                find_bin(bins, found)
            cuda.syncthreads()
            if found[1] < 0:
                return limit
            prefix |= uint32(uint32(found[1]) << uint32(low))
            known |= uint32(uint32((1 << size) - 1) << uint32(low))
        return min(prefix, limit)

    @cuda.jit(device=True)
    def kept_units(value, best, heat, limit, min_p):  # type: ignore[no-untyped-def]
        distance = (best - value) / heat
        if distance >= float32(0) and bits_of(distance) <= limit and exp(-distance) >= min_p:
            return units_of(distance)
        return int64(0)

    @cuda.jit(device=True)
    def weigh(logits, start, begin, end, best, heat, limit, min_p, values, sums):  # type: ignore[no-untyped-def]
        """The weight of all kept tokens; each warp's part of it stays in ``sums``."""
        thread = cuda.threadIdx.x
        mine = int64(0)
        for first in range(begin + thread % WARP * lanes, end, warp_step):
            load_vector(logits, start + first, values)
            for k in range(lanes):
                mine += kept_units(values[k], best, heat, limit, min_p)
        mine = warp_sum(mine)
        cuda.syncthreads()
        if thread % WARP == 0:
            sums[thread // WARP] = mine
        cuda.syncthreads()
        total = int64(0)
        for warp in range(warps):
            total += sums[warp]
        return total

    def sample_rows(  # type: ignore[no-untyped-def]
        logits, temperatures, top_ks, top_ps, min_ps, seeds, positions, chosen, num_tokens, row_stride
    ):
        bins = cuda.shared.array(BINS, int64)
        sums = cuda.shared.array(warps, int64)
        found = cuda.shared.array(2, int64)
        peaks = cuda.shared.array(warps, float32)
        places = cuda.shared.array(warps, int32)
        values = cuda.local.array(lanes, float32)
        row, thread = cuda.blockIdx.x, cuda.threadIdx.x
        start = row * row_stride
        best, place = best_of_row(logits, start, num_tokens, values, peaks, places)
        if thread == 0:
            chosen[row] = place if place < num_tokens else 0
        temperature = temperatures[row]
        if temperature <= float32(0) or place == num_tokens or best == -never:
            return
        heat = max(temperature, float32(MIN_TEMPERATURE))
        part = (num_tokens + warps * warp_step - 1) // (warps * warp_step) * warp_step
        warp, lane = thread // WARP, thread % WARP
        begin = min(num_tokens, warp * part)
        end = min(num_tokens, begin + part)
        limit, top_k, top_p, min_p = uint32(EVERYTHING), top_ks[row], top_ps[row], min_ps[row]
        total = int64(0)
        for rule in range(3):  # top_k, top_p, and what is left; a loop, so that the compiler keeps one copy of each
            is_cut = 0 < top_k < num_tokens if rule == 0 else rule == 1 and top_p < float32(1)
            target = int64(top_k)
            if rule == 2 or (rule == 1 and is_cut):
                floor = min_p if rule == 2 else float32(0)
                total = weigh(logits, start, begin, end, best, heat, limit, floor, values, sums)
                target = max(int64(1), share_of(total, int64(top_p * float32(2.0**SHARE_BITS))))
            if is_cut:
                by_weight = rule == 1
                limit = find_limit(logits, start, num_tokens, best, heat, by_weight, limit, target, values, bins, found)
        key = mixed(uint64(seeds[row] + GOLDEN_GAMMA))
        target = scaled(mixed(uint64(key + uint64(positions[row] + uint64(1)) * GOLDEN_GAMMA)), total)
        for other in range(warp):
            target -= sums[other]
        if target < 0 or target >= sums[warp]:
            return  # the draw falls into another warp's part
        for first in range(begin, end, warp_step):
            mine = int64(0)
            token = first + lane * lanes
            if token < end:
                load_vector(logits, start + token, values)
                for k in range(lanes):
                    mine += kept_units(values[k], best, heat, limit, min_p)
            reached = sum_before(mine, lane)
            if reached - mine <= target < reached:
                left = target - (reached - mine)
                for k in range(lanes):
                    units = kept_units(values[k], best, heat, limit, min_p)
                    if 0 <= left < units:
                        chosen[row] = token + k
                    left -= units
            target -= cuda.shfl_sync(ALL_LANES, reached, WARP - 1)
            if target < 0:
                return

    wide, bits = pointer(torch.float32), pointer(torch.uint64)
    rules = wide, pointer(torch.int32), wide, wide, bits, bits
    return Kernel(sample_rows, pointer(dtype), *rules, pointer(torch.int64), INT, LONG, max_threads=threads)
