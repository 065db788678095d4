"""Steps of a real engine decide whether its exits stay on, whatever the cost model was told."""

from __future__ import annotations

import time
from typing import Any

import pytest

from exit_helpers import NUM_LAYERS, forced_engine
from references import assert_idle, ragged_prompts
from tide_ray import SamplingParams, TideEngine
from tide_ray.engine.comparison import FIRST_TRIALS, TURN_STEPS, TURNS
from tide_ray.engine.cost_model import FREE, CostCurve, EngineCosts
from tide_ray.engine.measure import measure_costs
from tide_ray.engine.planner import LaunchPlanner
from tide_ray.exits.policies import Candidates, ForcedExits, Verdict
from tiny_models import VOCAB_SIZE, build_tiny_model

MANY_STEPS = FIRST_TRIALS * len(TURNS) * (TURN_STEPS + 4) + 40


class SlowToAsk(ForcedExits):
    def decide(self, rows: Candidates) -> Verdict:
        time.sleep(0.02)
        return super().decide(rows)


def promising_engine(share: float, deep: CostCurve) -> TideEngine:
    """The cost model holds that the deep stage costs more than the shallow one, and that asking costs nothing."""
    model = build_tiny_model("llama")
    engine = forced_engine(model, (2,), (share,), max_model_len=MANY_STEPS + 16, max_num_seqs=4, num_threads=1)
    shallow = CostCurve((1, 4), (0.001, 0.002))
    engine.runner.planner = LaunchPlanner(EngineCosts((shallow, deep), (FREE,), (FREE,), FREE), [share])
    return engine


def depths(engine: TideEngine, num_tokens: int = MANY_STEPS) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    outputs = engine.generate(ragged_prompts(4, VOCAB_SIZE, longest=8), params)
    assert_idle(engine)
    return [output.outputs[0].exit_layers for output in outputs]


def trials(engine: TideEngine) -> list[dict[str, Any]]:
    planner = engine.runner.planner
    assert planner is not None
    assert planner.comparison is not None
    return planner.comparison.to_json()


@pytest.mark.parametrize("deep", [CostCurve((1, 4), (0.001, 0.01)), CostCurve((1, 4), (0.02, 0.0201))])
def test_exits_that_slow_steps_down_are_switched_off_and_rows_that_waited_go_on(deep: CostCurve) -> None:
    """The second curve makes the plan let rows wait, so that turns change with rows between the stages."""
    engine = promising_engine(0.6, deep)
    assert engine.runner.planner is not None
    assert engine.runner.exits is not None
    assert (engine.runner.planner.plan(4).holds[0] > 1) == (deep.seconds[0] > 0.01)
    engine.runner.exits.policy = SlowToAsk((0.6,))
    answers = depths(engine)
    assert {2, NUM_LAYERS} == {depth for answer in answers for depth in answer}
    first_to_end = min(answers, key=lambda answer: answer[-20:].count(2))  # later ones are few, another size class
    assert set(first_to_end[-20:]) == {NUM_LAYERS}
    assert trials(engine)[0]["measured_over_promised"] < 0.9


def test_exits_that_spare_time_stay_on() -> None:
    engine = promising_engine(1.0, CostCurve((1, 4), (0.001, 0.002)))
    adapter = engine.runner.adapter
    adapter.running_layers[NUM_LAYERS - 1].register_forward_pre_hook(lambda *_: time.sleep(0.02))
    answers = depths(engine)
    assert {depth for answer in answers for depth in answer[-20:]} == {2}
    assert trials(engine)[0]["trials"] >= FIRST_TRIALS


def test_an_engine_of_one_resident_is_measured_and_plans() -> None:
    """Curves of one point were asked for a hair more than one row, and the first step failed."""
    engine = forced_engine(build_tiny_model("llama"), (2,), (0.3,), max_model_len=64, max_num_seqs=1, num_threads=1)
    assert engine.runner.exits is not None
    costs = measure_costs(engine.runner, engine.runner.exits, engine.max_num_seqs)
    for share in (0.1, 0.3, 0.7):
        engine.runner.planner = LaunchPlanner(costs, [share])
        assert [len(answer) for answer in depths(engine, num_tokens=20)] == [20] * 4
