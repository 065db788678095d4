"""The launch numbers of all kernels: threads to a block, rows to a block, how far work is split.

Rows and tiles decide registers and shared memory, see ``python jobs/benchmark.py kernel-resources``.
"""

from __future__ import annotations

WARP_THREADS = 32

SPECIALISED_WIDTHS = (576, 768, 1024, 2048, 2560, 3072, 3584, 4096, 5120, 8192)
"""Hidden sizes whose rows are held in registers and read 16 bytes at a time; other widths take a general path."""

ROUTE_ROWS = 8
"""Rows that share one reading of a gate's weights."""
ROUTE_MAX_BOTTLENECK = 256
ROUTE_MIN_SLICE = 256
"""Channels of the state that a block multiplies; narrower states are not split over blocks."""
NORM_THREADS = 256
"""That share a row, at most."""
SILU_THREADS = 256
ROTARY_THREADS = 128
KV_WARPS = 4
"""Heads that a block writes, one to a warp."""
ATTENTION_WARPS = 4
ATTENTION_MAX_HEAD_DIM = 256
QUERY_NUMBERS_PER_BLOCK = 512
"""Numbers of queries that share one reading of a sequence's K and V; each query's sums need registers, too."""
MAX_QUERIES_PER_BLOCK = 4
MAX_QUERIES_OF_ROWS = 3
"""Where a sequence has several rows, each with its own reach: with four, registers spill before Hopper."""
MAX_QUERIES_OF_PRODUCT = 8
"""Queries that share one reading of K and V where tensor cores compute: columns of their smallest product."""
ATTENTION_BLOCKS_PER_PROCESSOR = 4
ATTENTION_MIN_TOKENS = 256
"""Tokens below which a sequence is not split over more blocks."""
MAX_SPLITS = 64
COMBINE_THREADS = 128
EXIT_ROWS = 4
"""Rows that share one reading of an exit head's weights."""
EXIT_THREADS = 256
EXIT_MAX_RANK = EXIT_THREADS
SAMPLE_THREADS = 512
PARTITION_THREADS = 512
"""Of the one block that parts the rows of a launch."""
MOVE_THREADS = 256
"""Words of a row that one block moves, at most."""


def whole_warps(threads: int) -> int:
    """``threads`` rounded up to whole warps."""
    return -(-threads // WARP_THREADS) * WARP_THREADS
