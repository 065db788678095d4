"""Which boundaries pay and how long survivors wait, from cost curves with known answers."""

from __future__ import annotations

import json
import math

import pytest

from tide_ray.engine.cost_model import FREE, CostCurve, EngineCosts, best_plan, expected_rate
from tide_ray.engine.planner import WARM_ROWS, LaunchPlanner


def line(fixed: float, per_row: float) -> CostCurve:
    return CostCurve((1, 1000), (fixed + per_row, fixed + 1000 * per_row))


def costs(*stages: CostCurve, gate: CostCurve = FREE, leaving: CostCurve = FREE) -> EngineCosts:
    num = len(stages) - 1
    return EngineCosts(stages, (gate,) * num, (leaving,) * num, FREE)


def test_a_curve_is_linear_between_and_beyond_its_points_and_flat_below() -> None:
    curve = CostCurve((1, 8, 64), (1.0, 2.0, 9.0))
    assert curve(0) == 0
    assert curve(0.5) == 1.0
    assert curve(4.5) == pytest.approx(1.5)
    assert curve(64) == 9.0
    assert curve(128) == pytest.approx(17.0)


def test_a_curve_of_one_point_goes_on_as_that_many_launches() -> None:
    curve = CostCurve((1,), (0.01,))
    assert [curve(rows) for rows in (0, 0.5, 1, 1 + 1e-12, 3)] == pytest.approx([0.0, 0.01, 0.01, 0.01, 0.03])


def test_measurements_that_contradict_each_other_are_taken_at_their_least() -> None:
    assert CostCurve.consistent((1, 8, 64), (3.0, 2.0, 9.0)) == CostCurve((1, 8, 64), (2.0, 2.0, 9.0))
    assert CostCurve.consistent((1, 8, 64), (1.0, 2.0, 40.0)) == CostCurve((1, 8, 64), (1.0, 2.0, 16.0))


def test_a_slow_moment_at_the_largest_size_makes_no_case_for_waiting() -> None:
    """Full depth measured a tenth too slow at 256 rows: smaller launches seemed to pay, waiting ended 7 % below it."""
    rows, first, second = (1, 128, 256), (2.0, 42.0, 82.0 * 1.1), (0.5, 10.5, 20.5 * 1.1)
    as_measured = costs(CostCurve(rows, first), CostCurve(rows, second))
    assert best_plan(as_measured, 256, [0.3]).holds[0] > 1
    consistent = costs(CostCurve.consistent(rows, first), CostCurve.consistent(rows, second))
    assert best_plan(consistent, 256, [0.3]).holds == (1,)


@pytest.mark.parametrize("hold", [1, 2, 5])
def test_the_rate_is_the_closed_form_of_two_stages(hold: int) -> None:
    """cost per token = (w_A + w_B / k) (p + k (1 - p)) / R + c_A + (1 - p) c_B."""
    w_a, c_a, w_b, c_b, p, residents = 3.0, 0.02, 5.0, 0.07, 0.6, 128
    rate = expected_rate(costs(line(w_a, c_a), line(w_b, c_b)), residents, [p], [True], [hold])
    cost = (w_a + w_b / hold) * (p + hold * (1 - p)) / residents + c_a + (1 - p) * c_b
    assert 1 / rate == pytest.approx(cost)


@pytest.mark.parametrize(("share", "w_a", "w_b"), [(0.9, 1.0, 4.0), (0.5, 1.0, 1.0), (0.8, 2.0, 9.0)])
def test_the_hold_is_the_square_root_rule(share: float, w_a: float, w_b: float) -> None:
    plan = best_plan(costs(line(w_a, 0.001), line(w_b, 0.001)), 256, [share], min_hold_gain=1.0)
    assert plan.is_on == (True,)
    assert abs(plan.holds[0] - math.sqrt(share * w_b / ((1 - share) * w_a))) <= 1


def test_survivors_wait_only_for_a_gain_that_the_model_is_sure_of() -> None:
    """Holding survivors back at 256 residents promised 4 % and ended 8 % below full depth."""
    stages = costs(line(1.0, 0.01), line(1.6, 0.01))
    (at_once, waiting) = (expected_rate(stages, 256, [0.7], [True], [hold]) for hold in (1, 2))
    assert 1.0 < waiting / at_once < 1.05
    assert best_plan(stages, 256, [0.7]).holds == (1,)
    assert best_plan(stages, 256, [0.7], min_hold_gain=1.0).holds[0] > 1


def test_a_boundary_is_off_where_asking_costs_more_than_exits_save() -> None:
    stages = line(1.0, 0.001), line(1.0, 0.001)
    assert best_plan(costs(*stages, gate=line(0.3, 0.0)), 8, [0.1]).is_on == (False,)
    assert best_plan(costs(*stages), 256, [0.0]).is_on == (False,)
    assert best_plan(costs(line(0.1, 0.01), line(0.1, 0.01), gate=line(0.01, 0.0)), 256, [0.5]).is_on == (True,)


def test_only_the_boundary_that_pays_is_on() -> None:
    stages = line(0.01, 0.01), line(0.01, 0.0001), line(0.01, 0.02)
    plan = best_plan(costs(*stages, gate=line(0.02, 0.0)), 64, [0.02, 0.5])
    assert plan.is_on == (False, True)


def test_the_bound_is_no_worse_than_the_plan_with_overheads() -> None:
    measured = costs(line(1.0, 0.01), line(1.0, 0.01), gate=line(0.05, 0.0001), leaving=line(0.02, 0.001))
    for residents in (1, 8, 64, 256):
        assert (
            best_plan(measured.without_overheads(), residents, [0.5]).rate >= best_plan(measured, residents, [0.5]).rate
        )


def test_observed_exits_replace_the_calibrated_share_and_switch_a_boundary_off_and_on() -> None:
    measured = costs(line(0.1, 0.01), line(0.1, 0.01), gate=line(0.05, 0.0))
    planner = LaunchPlanner(measured, [0.5])
    assert planner.plan(64).exits
    for _ in range(100):
        planner.observe(0, WARM_ROWS, 0)
    assert not planner.plan(64).exits
    for _ in range(100):
        planner.observe(0, WARM_ROWS, WARM_ROWS // 2)
    assert planner.plan(64).exits
    assert planner.num_switches == 2


def test_a_stage_that_slows_down_switches_its_boundary_on() -> None:
    """Contexts outgrow the start-up measurement: attention in the deep stage costs more, and skipping it then pays."""
    planner = LaunchPlanner(costs(line(0.1, 0.01), line(0.1, 0.001), gate=line(0.04, 0.0)), [0.5])
    assert not planner.plan(64).exits
    for _ in range(200):
        planner.took([0], 64, 0.1 + 64 * 0.01)
        planner.took([1], 64, 3 * (0.1 + 64 * 0.001))
    assert planner.time_factors == pytest.approx([1.0, 3.0], abs=0.1)
    assert planner.plan(64).exits


def test_a_machine_that_slows_down_altogether_changes_no_plan() -> None:
    measured = costs(line(0.1, 0.01), line(0.1, 0.01), gate=line(0.09, 0.0))
    planner = LaunchPlanner(measured, [0.5])
    before = planner.plan(64)
    for _ in range(400):
        planner.took([0, 1], 64, 2 * 2 * (0.1 + 64 * 0.01))
    after = planner.plan(64)
    assert (after.is_on, after.holds) == (before.is_on, before.holds)
    assert after.rate == pytest.approx(before.rate / 2, rel=0.1)


def test_one_slow_launch_changes_nothing() -> None:
    planner = LaunchPlanner(costs(line(0.1, 0.01), line(0.1, 0.01)), [0.5])
    planner.took([1], 64, 1000.0)
    assert planner.time_factors[1] < 1.1


def test_survivors_wait_for_as_many_launches_as_the_plan_says() -> None:
    planner = LaunchPlanner(None, [0.5])
    planner.current = best_plan(costs(line(1.0, 0.001), line(9.0, 0.001)), 256, [0.5])
    assert planner.current.holds == (3,)
    launches = []
    for _ in range(7):
        launches.append(planner.should_launch(1, 5))
        if launches[-1]:
            planner.launched(1)
    assert launches == [False, False, True, False, False, True, False]


def test_drafts_are_paid_for_by_launches_that_they_spare() -> None:
    """One resident: m rows of stage 0, one launch of m rows of stage 1, m choices and m - 1 drafts of the head."""
    p, a, head = 0.75, 0.9, line(0.5, 0.25)
    shallow, deep = line(1.0, 0.1), line(4.0, 0.1)
    measured = EngineCosts((shallow, deep), (FREE,), (FREE,), head)
    rate = expected_rate(measured, 1, [p], [True], [1], acceptance=a)
    seconds = 4 * shallow(1) + deep(4) + 4 * head(2 - 0.25)
    assert rate == pytest.approx((1 + a + a**2 + a**3) / seconds)
    off = expected_rate(measured, 1, [p], [False], [1], acceptance=a)
    assert off == pytest.approx(1 / (shallow(1) + deep(1) + head(1)))


def test_nothing_is_drafted_where_drafts_are_wrong_or_rows_are_what_costs() -> None:
    fixed, by_row = (line(1.0, 0.001), line(4.0, 0.001)), (line(0.01, 1.0), line(0.01, 1.0))
    assert best_plan(costs(*fixed), 1, [0.7], acceptance=0.95).is_on == (True,)
    assert best_plan(costs(*fixed), 1, [0.7], acceptance=0.3).is_on == (False,)
    assert best_plan(costs(*by_row), 1, [0.7], acceptance=1.0).is_on == (False,)
    # Exits save rows, drafts do not.
    assert best_plan(costs(*by_row), 64, [0.7]).is_on == (True,)
    assert best_plan(costs(*by_row), 64, [0.7], acceptance=1.0).is_on == (False,)


def test_drafting_stops_once_drafts_come_out_wrong_and_is_tried_again_later() -> None:
    planner = LaunchPlanner(costs(line(1.0, 0.001), line(4.0, 0.001)), [0.7], acceptance=0.98)
    assert planner.plan(1).is_on == (True,)
    for _ in range(200):
        planner.observe_drafts(0, 1)
    assert planner.plan(1).is_on == (False,)
    tries = [planner.plan(1).is_on for _ in range(64 * 30)]
    assert tries[:64] == [(False,)] * 64
    assert tries[-1] == (True,)


def test_launches_far_faster_than_measured_still_leave_a_plan() -> None:
    """Costs measured while something else held the machine were 20 times too high, and rounded to no time at all."""
    planner = LaunchPlanner(costs(line(1.0, 0.001), line(4.0, 0.001)), [0.7], acceptance=0.98)
    for _ in range(500):
        planner.took([0, 1], 4, 1e-6)
    assert max(planner.time_factors) < 0.05
    assert planner.plan(4).rate > 0


def test_costs_are_the_same_from_run_records() -> None:
    measured = EngineCosts(
        stages=(CostCurve((1, 8), (0.001, 0.0025)), CostCurve((1, 8), (0.002, 0.0035))),
        gates=(CostCurve((1, 8), (1e-6, 2e-6)),),
        exits=(CostCurve((1, 8), (3e-6, 4e-6)),),
        head=CostCurve((1, 8), (1e-4, 2e-4)),
    )
    assert EngineCosts.from_json(json.loads(json.dumps(measured.to_json()))) == measured
