"""A bounded, uniform sample of a stream of rows (algorithm R, Vitter 1985)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Reservoir:
    """Keeps at most ``capacity`` rows of named tensors, each row of a stream with the same probability."""

    def __init__(self, capacity: int, seed: int) -> None:
        self._capacity = capacity
        self._rng = np.random.default_rng(seed)
        self._rows: dict[str, Tensor] = {}
        self._num_seen = 0

    @property
    def num_rows(self) -> int:
        return min(self._num_seen, self._capacity)

    def add(self, **rows: Tensor) -> None:
        """Offer N rows: tensors ``[N, ...]`` under the same names each time."""
        count = len(next(iter(rows.values())))
        if not self._rows:
            self._rows = {name: torch.empty((self._capacity, *t.shape[1:]), dtype=t.dtype) for name, t in rows.items()}
        numbers = np.arange(self._num_seen, self._num_seen + count)
        places = np.where(numbers < self._capacity, numbers, self._rng.integers(0, numbers + 1))
        offered = np.flatnonzero(places < self._capacity)
        # Of rows that were drawn for one place the last one stays, as if they had come one by one.
        kept, first_from_end = np.unique(places[offered][::-1], return_index=True)
        index, chosen = torch.from_numpy(kept), torch.from_numpy(offered[::-1][first_from_end].copy())
        for name, tensor in rows.items():
            self._rows[name][index] = tensor[chosen]
        self._num_seen += count

    def take(self, name: str) -> Tensor:
        """The kept rows of one tensor."""
        return self._rows[name][: self.num_rows]
