"""A bounded, uniform sample of a stream of rows: those whose keys hash lowest (bottom-k, Cohen and Kaplan 2007).

A row's place in the sample depends on its key and the seed alone. So the order in which rows come does not matter, nor
how many workers saw them: the samples of parts merge into the sample of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

RANKS = "ranks"
"""Name of the kept rows' hashes among ``Reservoir.tensors``."""
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Reservoir:
    """Keeps at most ``capacity`` rows of named tensors, each row of a stream with the same probability."""

    def __init__(self, capacity: int, seed: int) -> None:
        self._capacity = capacity
        self._seed = seed
        self._ranks = np.empty(capacity, dtype=np.uint64)
        self._rows: dict[str, Tensor] = {}
        self._is_sorted = True
        self.num_rows = 0

    def add(self, keys: np.ndarray, **rows: Tensor) -> None:
        """Offer N rows: tensors ``[N, ...]`` under the same names each time.

        Args:
            keys: integers ``[N]``, another one for every row of the stream.
        """
        self._offer(hashed(keys, self._seed), rows)

    def merge(self, other: Reservoir) -> None:
        """Offer what a reservoir of the same capacity and seed kept of other rows of the stream."""
        self._offer(other._ranks[: other.num_rows], {name: t[: other.num_rows] for name, t in other._rows.items()})

    def take(self, name: str) -> Tensor:
        """The kept rows of one tensor, in an order that their keys and the seed decide."""
        if not self._is_sorted:
            order = np.argsort(self._ranks[: self.num_rows])
            self._ranks[: self.num_rows] = self._ranks[order]
            for tensor in self._rows.values():
                tensor[: self.num_rows] = tensor[torch.from_numpy(order)]
            self._is_sorted = True
        return self._rows[name][: self.num_rows]

    def tensors(self) -> dict[str, Tensor]:
        """What is kept, to be stored; ``restore`` reads it."""
        kept = {name: self.take(name) for name in self._rows}
        return {**kept, RANKS: torch.from_numpy(self._ranks[: self.num_rows].view(np.int64))}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Offer what ``tensors`` of a reservoir of the same capacity and seed returned."""
        ranks = tensors[RANKS].numpy().view(np.uint64)
        self._offer(ranks, {name: tensor for name, tensor in tensors.items() if name != RANKS})

    def _offer(self, ranks: np.ndarray, rows: Mapping[str, Tensor]) -> None:
        if not self._rows:
            with torch.inference_mode(False):  # rows may be offered within it, and are sorted and merged outside
                self._rows = {
                    name: torch.empty((self._capacity, *t.shape[1:]), dtype=t.dtype) for name, t in rows.items()
                }
        before = self.num_rows
        everyone = np.concatenate((self._ranks[:before], ranks))
        after = min(len(everyone), self._capacity)
        is_kept = np.ones(len(everyone), dtype=bool)
        if after < len(everyone):
            is_kept[np.argpartition(everyone, after)[after:]] = False
        chosen = np.flatnonzero(is_kept[before:])
        # Rows that are kept stay where they are; the new ones take the places of those that leave, then empty ones.
        places = np.concatenate((np.flatnonzero(~is_kept[:before]), np.arange(before, after)))
        assert len(places) == len(chosen)
        self._ranks[places] = ranks[chosen]
        index, source = torch.from_numpy(places), torch.from_numpy(chosen)
        for name, tensor in rows.items():
            self._rows[name][index] = tensor[source]
        self.num_rows = after
        self._is_sorted &= not len(chosen)


def hashed(keys: np.ndarray, seed: int) -> np.ndarray:
    """Pseudo-random uint64 of integer keys; distinct keys have distinct ones (splitmix64's finalizer)."""
    # Added as it is, a seed would only shift the keys, and the next seed would draw the same rows' neighbours.
    start = _mixed(np.array([seed % 2**64], dtype=np.uint64) + np.uint64(_GOLDEN))
    return _mixed(keys.astype(np.uint64) + start)


def _mixed(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
    return z ^ (z >> np.uint64(31))
