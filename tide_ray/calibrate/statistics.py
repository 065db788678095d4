"""What maps are fitted from: sums and a sample of rows, of any part of the sequences. Those of disjoint parts merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from tide_ray.calibrate.reservoir import Reservoir
from tide_ray.calibrate.ridge import Sums


@dataclass(slots=True)
class FitSums:
    """Sums by depth, and a sample of rows with ``state_D`` for every depth D and ``final``."""

    heads: dict[int, Sums]
    kv: dict[int, Sums]
    reservoir: Reservoir

    @property
    def num_rows(self) -> int:
        """Rows that exit heads are fitted on."""
        return next(iter(self.heads.values())).num_rows

    def merge(self, other: FitSums) -> None:
        for depth in self.heads:
            self.heads[depth].merge(other.heads[depth])
        for depth in self.kv:
            self.kv[depth].merge(other.kv[depth])
        self.reservoir.merge(other.reservoir)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, to be stored; ``restore`` reads it."""
        kinds = {"heads": self.heads, "kv": self.kv}
        sums = {
            f"{kind}.{depth}.{name}": tensor
            for kind, by_depth in kinds.items()
            for depth, one in by_depth.items()
            for name, tensor in one.tensors().items()
        }
        return {**sums, **{f"rows.{name}": tensor for name, tensor in self.reservoir.tensors().items()}}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what ``tensors`` returned; the sums are still empty."""
        for kind, by_depth in (("heads", self.heads), ("kv", self.kv)):
            for depth in by_depth:
                by_depth[depth] = Sums.restored(_within(f"{kind}.{depth}.", tensors))
        self.reservoir.restore(_within("rows.", tensors))


@dataclass(slots=True)
class FitStatistics:
    """Sums of the sequences that maps are fitted on, and of the held-out ones that choose among them.

    Those of disjoint parts of the sequences merge into those of the whole; their size does not grow with the rows.
    """

    train: FitSums
    held: FitSums

    def merge(self, other: FitStatistics) -> None:
        self.train.merge(other.train)
        self.held.merge(other.held)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name, to be stored, without the part that has no rows; ``restore`` reads it."""
        return {
            f"{part}.{name}": tensor
            for part, sums in self._parts().items()
            if sums.num_rows
            for name, tensor in sums.tensors().items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what ``tensors`` returned; the statistics are still empty."""
        for part, sums in self._parts().items():
            if stored := _within(f"{part}.", tensors):
                sums.restore(stored)

    def _parts(self) -> dict[str, FitSums]:
        return {"train": self.train, "held": self.held}


def _within(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
