"""The path of settings: safe ones first, each worth more than those before, decode and prefill exits together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from exit_helpers import make_routers
from references import loaded
from tide_ray.calibrate.certify_path import (
    MAX_PATH,
    Measured,
    exit_thresholds,
    order_path,
    pareto_front,
    prefill_thresholds,
    thinned,
)
from tide_ray.exits.certificates import NEVER, ExitSetting
from tide_ray.exits.checkpoint import Boundary
from tiny_models import build_tiny_model


@pytest.fixture(scope="module")
def boundaries() -> list[Boundary]:
    return make_routers(loaded(build_tiny_model("llama")), (1, 3)).boundaries


def rated(risk: float, saving: float) -> Measured:
    return Measured(ExitSetting((saving,)), np.array([risk]), 0.0, 0.0, saving)


def test_the_front_rises_in_risk_and_in_saving() -> None:
    points = [
        rated(0.03, 0.2),
        rated(0.01, 0.1),
        rated(0.02, 0.1),
        rated(0.01, 0.05),
        rated(0.0, 0.0),
        rated(0.05, 0.19),
    ]
    assert [(one.risk, one.saving) for one in pareto_front(points)] == [(0.01, 0.1), (0.03, 0.2)]


def test_thinning_keeps_both_ends() -> None:
    path = [rated(n / 100, n / 10) for n in range(1, 31)]
    kept = thinned(path, 7)
    assert len(kept) == 7
    assert (kept[0], kept[-1]) == (path[0], path[-1])
    assert thinned(path[:3], 7) == path[:3]


def test_axes_begin_with_no_exits_and_let_ever_more_go(boundaries: list[Boundary]) -> None:
    thresholds = exit_thresholds(boundaries[0])
    assert thresholds[:3] == [NEVER, 0.98, 0.95]
    assert thresholds == sorted(thresholds, reverse=True)
    assert prefill_thresholds(boundaries) == [None, 0.25, 0.5, 0.75, 0.9]
    assert exit_thresholds(Boundary(1, boundaries[0].head, boundaries[0].gate)) == [NEVER]
    assert prefill_thresholds([Boundary(1, boundaries[0].head, boundaries[0].gate)]) == [None]


def additive(settings: Sequence[ExitSetting]) -> list[Measured]:
    """The deep boundary is safe, the shallow one is not; stopping prompt tokens costs little and saves much."""
    measured = []
    for setting in settings:
        shallow, deep = (0.0 if t == NEVER else 1 - t for t in setting.thresholds)
        prompt = setting.prefill_threshold or 0.0
        risk = 0.2 * shallow + 0.04 * deep + 0.01 * prompt
        measured.append(Measured(setting, np.full(8, risk), 0.0, 0.0, 0.3 * shallow + 0.1 * deep + 0.2 * prompt))
    return measured


def test_the_path_combines_what_is_safe_and_leaves_out_what_is_not(boundaries: list[Boundary]) -> None:
    path = order_path(boundaries, additive, max_risk=0.03, prefill=True)
    assert 3 <= len(path) <= MAX_PATH
    assert [one.risk for one in path] == sorted(one.risk for one in path)
    assert [one.saving for one in path] == sorted(one.saving for one in path)
    assert path[-1].risk <= 1.5 * 0.03
    best = path[-1].setting
    assert best.prefill_threshold == 0.9
    assert best.thresholds[1] < NEVER, "decode and prefill exits together"
    decode = order_path(boundaries, additive, max_risk=0.03, prefill=False)
    assert all(one.setting.prefill_threshold is None for one in decode)


def test_no_setting_is_worth_testing_where_all_are_bad(boundaries: list[Boundary]) -> None:
    def bad(settings: Sequence[ExitSetting]) -> list[Measured]:
        return [Measured(setting, np.full(8, 0.9), 0.5, 0.0, 0.2) for setting in settings]

    assert order_path(boundaries, bad, max_risk=0.05, prefill=True) == []
