"""The path of settings along which certification goes, found on prompts of its own (Pareto testing, arXiv 2210.07913).

One axis for every boundary (from no exits to many) and one for the prompt's tokens. Risks of single axes nearly add up,
which says where on the grid to look; what is looked at is measured as a whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from tide_ray.exits.certificates import NEVER, ExitSetting
from tide_ray.exits.checkpoint import Boundary

EXIT_SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6)
PREFILL_SHARES = (0.25, 0.5, 0.75, 0.9)
MAX_COMBINED = 12
MAX_PATH = 10
LEAST_RISK = 1e-4
RISK_MARGIN = 1.5
"""Settings with up to this many times the largest epsilon on the ordering prompts are worth a look."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A setting on some prompts: ``losses`` of each, ``[n]``; shares of generated tokens that exited, of prompt tokens
    that stopped, and of the layer runs of both that were saved."""

    setting: ExitSetting
    losses: np.ndarray
    exit_share: float
    prefill_exit_share: float
    saving: float

    @property
    def risk(self) -> float:
        """Mean loss."""
        return float(self.losses.mean())


@dataclass(frozen=True, slots=True)
class _Guess:
    """A point of the grid with what its axes say of it."""

    point: tuple[int, ...]
    risk: float
    saving: float


class _Rated(Protocol):
    @property
    def risk(self) -> float: ...

    @property
    def saving(self) -> float: ...


Rated = TypeVar("Rated", bound=_Rated)
Measure = Callable[[Sequence[ExitSetting]], list[Measured]]


def order_path(boundaries: Sequence[Boundary], measure: Measure, *, max_risk: float, prefill: bool) -> list[Measured]:
    """Settings worth testing, the safest first; each saves more than those before it. Full depth is not among them.

    Args:
        measure: on prompts that no setting is tested on.
        max_risk: largest epsilon that is of interest.
        prefill: whether prompt tokens may stop.
    """
    axes: list[list[float | None]] = [exit_thresholds(boundary) for boundary in boundaries]
    axes.append(prefill_thresholds(boundaries) if prefill else [None])
    limit = RISK_MARGIN * max_risk
    notches = [(axis, n) for axis, values in enumerate(axes) for n in range(1, len(values))]
    singles = measure([_setting(axes, _only(axis, n, len(axes))) for axis, n in notches])
    by_notch = dict(zip(notches, singles, strict=True))
    combined = _promising(axes, by_notch, limit)
    measured = [*singles, *(measure([_setting(axes, point) for point in combined]) if combined else [])]
    return thinned([one for one in pareto_front(measured) if one.risk <= limit], MAX_PATH)


def exit_thresholds(boundary: Boundary) -> list[float | None]:
    """Gate scores that let rising shares of the calibration tokens go; the first lets none."""
    quantiles = boundary.score_quantiles
    scores = {quantiles[round((1 - share) * (len(quantiles) - 1))] for share in EXIT_SHARES} if quantiles else set()
    return [NEVER, *sorted(scores, reverse=True)]


def prefill_thresholds(boundaries: Sequence[Boundary]) -> list[float | None]:
    """Predicted damages below which rising shares of the calibration prompts' tokens lie; the first stops none."""
    has_gates = all(b.prefill_gate is not None and b.prefill_quantiles for b in boundaries)
    return [None, *sorted({boundaries[-1].prefill_threshold(s) for s in PREFILL_SHARES})] if has_gates else [None]


def pareto_front(rated: Sequence[Rated]) -> list[Rated]:
    """Those that nothing as safe saves as much as, by rising risk."""
    front: list[Rated] = []
    for one in sorted(rated, key=lambda m: (m.risk, -m.saving)):
        if one.saving > (front[-1].saving if front else 0.0):
            front.append(one)
    return front


def thinned(path: Sequence[Rated], count: int) -> list[Rated]:
    """At most ``count`` of them, by rising risk, evenly in its logarithm: small epsilons need a choice, too."""
    if len(path) <= count:
        return list(path)
    risks = np.log(np.maximum([one.risk for one in path], LEAST_RISK))
    wanted = np.linspace(risks[0], risks[-1], count)
    return [path[n] for n in sorted({int(np.abs(risks - risk).argmin()) for risk in wanted} | {len(path) - 1})][-count:]


def _promising(
    axes: Sequence[Sequence[float | None]], singles: dict[tuple[int, int], Measured], limit: float
) -> list[tuple[int, ...]]:
    """Grid points off the axes on the front of predicted risk and saving, both taken to add up."""
    guesses = []
    for point in itertools.product(*(range(len(values)) for values in axes)):
        moved = [singles[axis, n] for axis, n in enumerate(point) if n]
        guesses.append(_Guess(point, sum(one.risk for one in moved), sum(one.saving for one in moved)))
    front = pareto_front([guess for guess in guesses if guess.risk <= limit])
    return [guess.point for guess in thinned([g for g in front if sum(map(bool, g.point)) > 1], MAX_COMBINED)]


def _only(axis: int, notch: int, num_axes: int) -> tuple[int, ...]:
    return tuple(notch if n == axis else 0 for n in range(num_axes))


def _setting(axes: Sequence[Sequence[float | None]], point: Sequence[int]) -> ExitSetting:
    *thresholds, prefill = (values[n] for values, n in zip(axes, point, strict=True))
    return ExitSetting(tuple(NEVER if t is None else t for t in thresholds), prefill)
