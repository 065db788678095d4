"""The replay of whole sequences chooses what the engine chooses token by token, exits and their K/V in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from exit_helpers import NUM_LAYERS, forced_engine
from references import ragged_prompts
from tide_ray import SamplingParams, TideEngine
from tide_ray.calibrate.corpus import Example
from tide_ray.calibrate.replay import Replay, Replayed, ReplayRows, Stops
from tide_ray.exits.policies import Candidates
from tide_ray.exits.rotary import find_rotary
from tiny_models import VOCAB_SIZE, build_tiny_model

DEPTHS, SHARES = (1, 3), (0.4, 0.5)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return ragged_prompts(9, VOCAB_SIZE, longest=20)


def answer(engine: TideEngine, prompts: list[list[int]]) -> list[Any]:
    params = [SamplingParams(temperature=0, max_tokens=14, ignore_eos=True, seed=n) for n in range(len(prompts))]
    return [output.outputs[0] for output in engine.generate(prompts, params)]


def replayed(engine: TideEngine, prompts: list[list[int]], answers: list[Any], *, rows_per_launch: int) -> Replayed:
    """The engine's answers through a replay whose rows stop where the engine's would."""
    exits = engine.runner.exits
    assert exits is not None

    def stops(boundary: int, states: Tensor, rows: ReplayRows) -> np.ndarray:
        verdict = exits.policy.decide(
            Candidates(
                boundary=boundary,
                states=states,
                thresholds=np.where(rows.is_generated, 0.0, np.inf),
                scorers=["router"] * len(states),
                keys=[(int(s), int(p) + 1) for s, p in zip(rows.sequences, rows.positions, strict=True)],
            )
        )
        threshold = exits.prefill_thresholds[boundary]
        if threshold is None:
            return verdict.stops
        gate = exits.boundaries[boundary].prefill_gate
        assert gate is not None
        is_spared = rows.is_prompt & (rows.positions > 0)
        at, of = torch.from_numpy(rows.positions), torch.from_numpy(rows.first_judged + 1)
        return verdict.stops | (is_spared & (gate.damages(states, at, of).numpy() < threshold))

    adapter = engine.runner.adapter
    replay = Replay(
        adapter,
        exits.boundaries,
        find_rotary(adapter),
        kv_policy=exits.kv_policy,
        longest=64,
        rows_per_launch=rows_per_launch,
    )
    examples = [Example([*p, *a.token_ids[:-1]], len(p) - 1) for p, a in zip(prompts, answers, strict=True)]
    return replay.run(examples, stops)


@pytest.mark.parametrize("rows_per_launch", [40, 1024])
@pytest.mark.parametrize("kv_policy", ["fitted", "copy", "deferred"])
def test_choices_and_depths_are_the_engines(prompts: list[list[int]], kv_policy: str, rows_per_launch: int) -> None:
    engine = forced_engine(build_tiny_model("llama"), DEPTHS, SHARES, kv_policy=kv_policy)
    answers = answer(engine, prompts)
    same = replayed(engine, prompts, answers, rows_per_launch=rows_per_launch)
    assert same.choices.tolist() == [token for a in answers for token in a.token_ids]
    assert same.depths.tolist() == [depth for a in answers for depth in a.exit_layers]
    assert {1, 3, NUM_LAYERS} == set(same.depths.tolist())


def test_prompt_rows_that_stop_leave_the_same_keys_and_values(prompts: list[list[int]]) -> None:
    engine = forced_engine(build_tiny_model("llama"), DEPTHS, SHARES, prefill_tail=1, prefill_thresholds=[0.45, 0.5])
    answers = answer(engine, prompts)
    assert 0 < engine.stats.num_prefill_exits < sum(map(len, prompts))
    same = replayed(engine, prompts, answers, rows_per_launch=1024)
    assert same.choices.tolist() == [token for a in answers for token in a.token_ids]


@pytest.mark.parametrize("kv_policy", ["fitted", "copy", "deferred"])
def test_variants_in_the_same_launches_come_out_as_each_alone(prompts: list[list[int]], kv_policy: str) -> None:
    """Those that stop the same rows at a boundary run on together; K/V of one must not reach another."""
    engine = forced_engine(build_tiny_model("llama"), DEPTHS, (0.0, 0.0), kv_policy=kv_policy)
    answers = answer(engine, prompts)
    examples = [Example([*p, *a.token_ids[:-1]], len(p) - 1) for p, a in zip(prompts, answers, strict=True)]
    draws = np.random.default_rng(4).random((2, sum(len(example.token_ids) for example in examples)))

    def stopping(shallow: float, deep: float, prompt: float) -> Stops:
        def stops(boundary: int, _states: Tensor, rows: ReplayRows) -> np.ndarray:
            drawn = draws[boundary, rows.row_numbers]
            prompt_stops = rows.is_prompt & (rows.positions > 0) & (drawn < prompt)
            return (rows.is_generated & (drawn < (shallow, deep)[boundary])) | prompt_stops

        return stops

    shares = [(0, 0, 0), (0, 0.5, 0), (0.3, 0.5, 0), (0, 0.2, 0), (0.3, 0.1, 0), (0, 0.5, 0.6), (1, 1, 1), (0, 0.5, 0)]
    variants = [stopping(*one) for one in shares]
    exits = engine.runner.exits
    assert exits is not None
    adapter = engine.runner.adapter
    replay = Replay(adapter, exits.boundaries, find_rotary(adapter), kv_policy=kv_policy, longest=64)
    together = replay.run_all(examples, variants)
    for variant, one in zip(variants, together, strict=True):
        alone = replay.run(examples, variant)
        for name in Replayed.__slots__:
            assert getattr(one, name).tolist() == getattr(alone, name).tolist()
    assert len({tuple(one.choices) for one in together}) == len(set(shares))
