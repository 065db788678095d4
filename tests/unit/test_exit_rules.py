"""What a request's and an engine's exit settings come to, and the policies' verdicts."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from exit_helpers import forced_engine, make_routers
from references import greedy, loaded
from tide_ray import EngineConfig, SamplingParams, TideEngine, UserError
from tide_ray.engine.exit_setup import exit_rules
from tide_ray.exits.policies import Candidates, CapacityExits, ForcedExits, ScoredExits, Scorer, confidence_scores
from tide_ray.exits.readouts import unit_rms
from tiny_models import build_tiny_model

NEVER = math.inf


@pytest.fixture(scope="module")
def routers() -> Any:
    return make_routers(loaded(build_tiny_model("llama")), (1, 3))


@pytest.mark.parametrize(
    ("engine", "request_", "thresholds", "scorer"),
    [
        ({}, {}, (0.5, 0.5), "router"),
        ({"exit_error": 0.01}, {}, (0.9, 0.9), "router"),
        ({"exit_threshold": 0.7}, {}, (0.7, 0.7), "router"),
        ({"exit_threshold": 0.7}, {"exit_threshold": 0.2}, (0.2, 0.2), "router"),
        ({"exit_min_depth": 2}, {}, (NEVER, 0.5), "router"),
        ({"exit_min_depth": 3}, {}, (NEVER, 0.5), "router"),
        ({}, {"exit_min_depth": 4}, (NEVER, NEVER), "router"),
        ({"exit_min_depth": 2}, {"exit_min_depth": 0}, (0.5, 0.5), "router"),
        ({}, {"exit_policy": "full"}, (NEVER, NEVER), "router"),
        ({"policy": "full"}, {}, (NEVER, NEVER), "router"),
        ({"policy": "full"}, {"exit_policy": "router"}, (0.5, 0.5), "router"),
        ({}, {"exit_policy": "confidence", "exit_threshold": 0.8}, (0.8, 0.8), "confidence"),
    ],
)
def test_a_requests_settings_win_over_the_engines(
    routers: Any, engine: dict[str, Any], request_: dict[str, Any], thresholds: tuple[float, ...], scorer: str
) -> None:
    """A minimum depth counts layers that have run: at depth 3, a minimum of 3 is reached."""
    rules = exit_rules(EngineConfig(exits="given", **engine), routers, SamplingParams(**request_))
    assert rules.thresholds == thresholds
    assert rules.scorer == scorer


def test_what_cannot_be_asked_is_refused_by_name(routers: Any) -> None:
    with pytest.raises(UserError, match=r"exit_error must be a calibrated level \(0.01, 0.02\), got 0.03"):
        exit_rules(EngineConfig(exits="given", exit_error=0.03), routers, SamplingParams())
    with pytest.raises(UserError, match="exit_policy 'confidence' needs exit_threshold"):
        exit_rules(EngineConfig(exits="given"), routers, SamplingParams(exit_policy="confidence"))
    engine = TideEngine(loaded(build_tiny_model("llama")), EngineConfig(max_model_len=32))
    output = engine.generate([[5, 6]], SamplingParams(exit_threshold=0.5))[0]
    assert output.error == "exit_threshold needs an engine with exits (a router checkpoint), got 0.5"
    for name, value in (("exit_threshold", 2.0), ("exit_min_depth", -1), ("exit_policy", "static")):
        with pytest.raises(UserError, match=name):
            SamplingParams(**{name: value})


def candidates(routers: Any, num: int, **changes: Any) -> Candidates:
    states = unit_rms(torch.randn(num, 64, generator=torch.Generator().manual_seed(1)))
    values = {"thresholds": np.full(num, 0.5), "scorers": ["router"] * num, "keys": [(n, 7) for n in range(num)]}
    return Candidates(boundary=0, states=states, **{**values, **changes})


def scorer(routers: Any) -> Scorer:
    model = build_tiny_model("llama")
    return Scorer(routers.boundaries, model.model.norm, lambda normed: model.lm_head(normed)[0])


def test_rows_of_one_launch_may_be_scored_in_different_ways(routers: Any) -> None:
    with torch.inference_mode():
        mixed = ScoredExits(scorer(routers)).decide(candidates(routers, 6, scorers=["router", "confidence"] * 3))
        gates = ScoredExits(scorer(routers)).decide(candidates(routers, 6))
        sure = ScoredExits(scorer(routers)).decide(candidates(routers, 6, scorers=["confidence"] * 6))
    np.testing.assert_allclose(mixed.scores[::2], gates.scores[::2], rtol=1e-5)
    np.testing.assert_allclose(mixed.scores[1::2], sure.scores[1::2], rtol=1e-5)


@pytest.mark.parametrize("capacity", [0.25, 0.5, 1.0])
def test_a_capacity_is_the_share_that_goes_deeper_and_takes_the_least_sure(routers: Any, capacity: float) -> None:
    with torch.inference_mode():
        verdict = CapacityExits(scorer(routers), capacity).decide(candidates(routers, 8))
    assert verdict.stops.sum() == round((1 - capacity) * 8)
    if 0 < verdict.stops.sum() < 8:
        assert verdict.scores[verdict.stops].min() >= verdict.scores[~verdict.stops].max()


def test_forced_exits_have_their_share_and_do_not_depend_on_the_batch(routers: Any) -> None:
    keys = [(seed, position) for seed in range(60) for position in range(50)]
    rows = candidates(routers, 3000, keys=keys)
    stops = ForcedExits([0.3, 0.3]).decide(rows).stops
    assert abs(stops.mean() - 0.3) < 0.03
    some = [5, 17, 2999]
    alone = ForcedExits([0.3, 0.3]).decide(candidates(routers, 3, keys=[keys[i] for i in some]))
    assert alone.stops.tolist() == stops[some].tolist()
    assert not ForcedExits([0.3], unanimous=True).decide(rows).stops.any()


def test_confidence_is_high_for_a_peak_and_low_for_a_plain() -> None:
    peak, plain = torch.zeros(2, 50), torch.zeros(2, 50)
    peak[:, 7] = 30.0
    for measure in ("probability", "margin", "entropy"):
        assert float(confidence_scores(peak, measure)[0]) > 0.99
        assert float(confidence_scores(plain, measure)[0]) < 0.05


def test_prompt_rows_below_the_predicted_error_stop_but_not_the_first_and_the_last() -> None:
    model = build_tiny_model("llama")
    engine = forced_engine(model, (2,), (0.0,), prefill_tail=5, prefill_thresholds=[2.0])  # every token may stop
    prompts = [[7] * 20, [8] * 4, [9] * 6]
    engine.generate(prompts, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    assert engine.stats.num_prefill_exits == (20 - 5 - 1) + 0 + (6 - 5 - 1)
    num_rows = sum(map(len, prompts)) + 3 * 2
    assert engine.stats.rows_through_layer == [num_rows, num_rows, num_rows - 14, num_rows - 14]


def test_prefill_exits_give_the_same_answer_in_chunks_and_alone() -> None:
    model = build_tiny_model("llama")
    prompts = [list(range(5, 45)), list(range(60, 90)), list(range(100, 112))]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    answers = []
    for limits in ({}, {"max_num_batched_tokens": 9}, {"max_num_seqs": 1}):
        engine = forced_engine(model, (2,), (0.0,), prefill_tail=4, prefill_thresholds=[0.5], **limits)
        answers.append([o.outputs[0].token_ids for o in engine.generate(prompts, params)])
        assert 0 < engine.stats.num_prefill_exits < 66
    assert answers[0] == answers[1] == answers[2]


def test_a_request_for_full_depth_runs_its_prompt_at_full_depth_beside_prompts_that_stop() -> None:
    """Such a request once had its prompt rows stopped like all others: its answer was not full depth's."""
    model, prompt = build_tiny_model("llama"), list(range(7, 27))
    expected = greedy(model, prompt, 6)
    engine = forced_engine(model, (2,), (0.0,), prefill_tail=5, prefill_thresholds=[2.0])
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    full = dataclasses.replace(params, exit_policy="full")
    stopped, whole = (output.outputs[0].token_ids for output in engine.generate([prompt, prompt], [params, full]))
    assert engine.stats.num_prefill_exits == 20 - 5 - 1, "of the first prompt alone"
    assert whole == expected != stopped


def test_post_hoc_selection_runs_every_layer_and_takes_the_first_state_that_passes() -> None:
    """The tokens are those of the exit head, on K/V of full depth, and nothing is saved."""
    model = build_tiny_model("llama")
    engine = forced_engine(model, (1, 3), (0.5, 0.5), kv_policy="full")
    prompts = [[7, 8, 9], [10, 11, 12, 13]]
    outputs = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, seed=1))
    depths = [d for o in outputs for d in o.outputs[0].exit_layers]
    assert {1, 3, 4} == set(depths)
    num_rows = sum(map(len, prompts)) + 11 * 2
    assert engine.stats.rows_through_layer == [num_rows] * 4
