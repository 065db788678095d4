"""Ridge regression from streamed sums: memory does not depend on the number of rows, and sums of workers add up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Candidates, in units of the mean diagonal of X'X / n."""


@dataclass(slots=True)
class Sums:
    """X'X, X'Y and Y'Y's diagonal over rows; X is the input with a constant column after it. float64."""

    gram: Tensor
    cross: Tensor
    targets: Tensor
    num_rows: int = 0

    @classmethod
    def zeros(cls, num_inputs: int, num_outputs: int) -> Sums:
        n = num_inputs + 1
        return cls(
            torch.zeros(n, n, dtype=torch.float64),
            torch.zeros(n, num_outputs, dtype=torch.float64),
            torch.zeros(num_outputs, dtype=torch.float64),
        )

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add rows: ``inputs`` ``[N, D]`` and ``outputs`` ``[N, W]``. Products are float32 within one call."""
        x = torch.cat((inputs.float(), torch.ones(len(inputs), 1, device=inputs.device)), dim=1)
        y = outputs.float()
        self.gram += (x.T @ x).double().cpu()
        self.cross += (x.T @ y).double().cpu()
        self.targets += y.square().sum(0).double().cpu()
        self.num_rows += len(inputs)

    def merge(self, other: Sums) -> None:
        """Add another worker's sums."""
        self.gram += other.gram
        self.cross += other.cross
        self.targets += other.targets
        self.num_rows += other.num_rows

    def tensors(self) -> dict[str, Tensor]:
        """The sums, to be stored; ``restored`` reads them."""
        return {
            "gram": self.gram,
            "cross": self.cross,
            "targets": self.targets,
            "num_rows": torch.tensor(self.num_rows),
        }

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor]) -> Sums:
        return cls(tensors["gram"], tensors["cross"], tensors["targets"], int(tensors["num_rows"]))

    def solve(self, penalty: float) -> Tensor:
        """Weights ``[D + 1, W]`` of least squared error plus ``penalty`` times their squares (the bias's excepted)."""
        scale = self.gram.diagonal()[:-1].mean()
        ridge = torch.full((len(self.gram),), float(penalty * scale), dtype=torch.float64)
        ridge[-1] = 1e-9 * self.num_rows
        factor = torch.linalg.cholesky(self.gram + torch.diag(ridge))
        return torch.cholesky_solve(self.cross, factor)

    def error(self, weights: Tensor) -> float:
        """Mean squared error of ``weights`` on these rows as a share of the targets' mean square."""
        fitted = (weights * (self.gram @ weights)).sum() - 2 * (weights * self.cross).sum()
        return float((self.targets.sum() + fitted) / self.targets.sum())


def fit(sums: Sums, held_out: Sums) -> tuple[Tensor, float, float]:
    """Weights with the penalty that is best on ``held_out``; also that penalty, and the relative error there."""
    tried = [(held_out.error(weights), penalty, weights) for penalty in PENALTIES for weights in [sums.solve(penalty)]]
    error, penalty, weights = min(tried, key=lambda item: item[:2])
    return weights, penalty, error


def low_rank(sums: Sums, weights: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Reduced-rank regression (Izenman 1975): factors ``down [D, r]`` and ``up [r, W]`` of ``weights`` without bias.

    The directions kept are the principal ones of the fitted values.
    """
    fitted = weights.T @ sums.gram @ weights
    directions = torch.linalg.eigh(fitted).eigenvectors[:, -rank:]
    return weights[:-1] @ directions, directions.T


def set_linear(linear: nn.Linear, weights: Tensor) -> None:
    """Put ``weights`` ``[D + 1, W]`` into a linear layer with bias."""
    with torch.no_grad():
        linear.weight.copy_(weights[:-1].T)
        linear.bias.copy_(weights[-1])
