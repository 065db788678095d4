"""K/V pages: fixed-size blocks of tokens, one pool per layer, handed out by page number.

Layout of a pool: ``[num_pages, H_kv, page_size, head_dim]``; a page holds ``page_size`` consecutive tokens of one
sequence, and each head's tokens lie together so that decode attention streams them. Page 0.. of every layer share one
numbering: a sequence owns the same page numbers in all layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tide_kernels.kv_write import write_kv
from tide_ray.models.adapter import KVShape


class PagePool:
    """Free page numbers. Allocation is all or nothing."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` page numbers, or None when fewer are free."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def release(self, pages: Sequence[int]) -> None:
        self._free.extend(pages)


class KVCache:
    """The K and V pools of every layer. Neighbouring layers of one shape lie in one tensor, see ``write_layers``."""

    def __init__(
        self, shapes: Sequence[KVShape], *, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        self.key_pools: list[Tensor] = []
        self.value_pools: list[Tensor] = []
        self._joined: list[tuple[int, Tensor, Tensor]] = []  # first layer, its run's K and V pools
        for shape, run in itertools.groupby(shapes):
            size = (len(list(run)), num_pages, shape.num_heads, page_size, shape.head_dim)
            keys, values = _zeros(size, dtype, device), _zeros(size, dtype, device)
            self._joined.append((len(self.key_pools), keys, values))
            self.key_pools += list(keys)
            self.value_pools += list(values)

    def release(self) -> None:
        """Free the pools, for good: nothing can be written or read any more."""
        self.key_pools.clear()
        self.value_pools.clear()
        self._joined.clear()

    def write(self, layer: int, pages: Tensor, offsets: Tensor, key: Tensor, value: Tensor) -> None:
        """Store K/V rows ``[N, H_kv, d]`` at page numbers and offsets ``[N]`` of one layer."""
        write_kv(self.key_pools[layer], self.value_pools[layer], pages, offsets, key, value)

    def write_layers(self, first: int, pages: Tensor, offsets: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store K/V ``[N, layers, H_kv, d]`` of layers from ``first`` on, all of one shape, in one go."""
        for start, key_pool, value_pool in self._joined:
            if start <= first < start + len(key_pool):
                run = slice(first - start, first - start + keys.shape[1])
                key_pool[run, pages, :, offsets] = keys
                value_pool[run, pages, :, offsets] = values
                return
        raise AssertionError(f"{first = } is not a layer")

    def gather(self, layer: int, pages: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """K and V ``[H_kv, length, d]`` of the first ``length`` tokens of the sequence that owns ``pages``."""
        return tuple(  # type: ignore[return-value]
            pool[pages].transpose(0, 1).flatten(1, 2)[:, :length]
            for pool in (self.key_pools[layer], self.value_pools[layer])
        )


def _zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that on a CPU take memory only where they are written.

    torch fills its zeros, which made an engine with 11 GB of pages a minute slow to start; numpy maps zero pages (huge
    ones where the system has them).
    """
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(size) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(size)


def page_bytes(shapes: Sequence[KVShape], page_size: int, dtype: torch.dtype) -> int:
    """Bytes that one page takes over all layers, K and V."""
    return sum(2 * shape.num_heads * shape.head_dim for shape in shapes) * page_size * dtype.itemsize
