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

from tide_kernels.kv_write import Rotation, write_kv, write_kv_layers
from tide_ray.models.adapter import KVShape

PAGES_PER_EXTENT = 8


class PagePool:
    """Free page numbers. Allocation is all or nothing.

    A sequence's pages follow one another where there is room: reading K/V that lie apart is half as fast, as the
    hardware foresees only what follows. So page numbers come in extents, a sequence starts in a free one, and pages of
    another's extent are given out once no extent is free.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = dict.fromkeys(range(num_pages))
        self._num_used = [0] * -(-num_pages // PAGES_PER_EXTENT)
        self._free_extents = dict.fromkeys(range(len(self._num_used) - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def has_free_extent(self) -> bool:
        return bool(self._free_extents)

    def allocate(self, count: int, after: int | None = None) -> list[int] | None:
        """``count`` page numbers, or None when fewer are free; if possible the ones that follow ``after``."""
        if count > len(self._free):
            return None
        pages: list[int] = []
        for _ in range(count):
            after = self._take(None if after is None else after + 1)
            pages.append(after)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        for page in pages:
            self._free[page] = None
            extent = page // PAGES_PER_EXTENT
            self._num_used[extent] -= 1
            if not self._num_used[extent]:
                self._free_extents[extent] = None

    def _take(self, wished: int | None) -> int:
        # The first page of an extent is somebody's start unless the extent is free.
        starts = wished is not None and wished % PAGES_PER_EXTENT == 0
        if wished in self._free and not (starts and wished // PAGES_PER_EXTENT not in self._free_extents):
            page = wished
        elif self._free_extents:
            page = next(reversed(self._free_extents)) * PAGES_PER_EXTENT
        else:
            page = next(reversed(self._free))
        del self._free[page]
        self._free_extents.pop(page // PAGES_PER_EXTENT, None)
        self._num_used[page // PAGES_PER_EXTENT] += 1
        return page


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

    def write_layers(
        self,
        first: int,
        pages: Tensor,
        offsets: Tensor,
        keys: Tensor,
        values: Tensor,
        rotation: Rotation | None = None,
    ) -> None:
        """Store K/V ``[N, layers, H_kv, d]`` of layers from ``first`` on, all of one shape, in one go; K are turned
        first where they are not yet."""
        for start, key_pool, value_pool in self._joined:
            if start <= first < start + len(key_pool):
                run = slice(first - start, first - start + keys.shape[1])
                write_kv_layers(key_pool[run], value_pool[run], pages, offsets, keys, values, rotation=rotation)
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
