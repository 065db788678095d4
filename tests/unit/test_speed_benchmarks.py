"""Benchmarks of decoding steps, on a model of random weights that is made on the spot."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest

from tide_ray import UserError

TINY: dict[str, Any] = {"model": "random:llama-tiny", "dtype": "float32", "tokens": 6, "rounds": 1, "num_threads": 1}


@pytest.fixture
def depth() -> ModuleType:
    return importlib.import_module("bench_depth")


def test_random_weights_are_the_same_every_time_and_shapes_have_names() -> None:
    shapes = importlib.import_module("bench_shapes")
    first, again = (shapes.open_model("random:llama-tiny", dtype="float32").model for _ in range(2))
    assert all((a == b).all() for a, b in zip(first.parameters(), again.parameters(), strict=True))
    with pytest.raises(UserError, match="random: takes one of llama-3-8b, qwen3-8b, llama-tiny, got 'gpt-9'"):
        shapes.open_model("random:gpt-9", dtype="float32")


def test_a_ratio_is_to_full_depths_turns_of_the_same_round(depth: ModuleType) -> None:
    """In the second round everything took twice as long, which is no speed-up and no slow-down."""
    names = ("full depth", "chosen", "full depth, again")
    first, chosen, again = (depth.Contender(name, None) for name in names)
    first.rates, chosen.rates, again.rates = [90.0, 45.0], [120.0, 60.0], [110.0, 55.0]
    assert chosen.speedup([first, again]) == pytest.approx(1.2)
    assert first.speedup([first, again]) == pytest.approx(0.9)


def test_every_policy_decodes_at_every_number_of_residents_that_fits(depth: ModuleType) -> None:
    measured = depth.run_depth(
        **TINY, scenarios=[depth.Scenario(2, 0.5)], residents=[1, 3], min_seconds=0.0, prompt_tokens=[5, 20]
    )
    rows = measured["scenarios"][0]["rows"]
    assert [(row["prompt_tokens"], row["residents"]) for row in rows] == [(5, 1), (5, 3), (20, 1), (20, 3)]
    for row in rows:
        assert set(row["speedup"]) >= {"full depth", "survivors at once", "chosen", "full depth, again"}
        assert all(rate > 0 for rate in row["tokens_per_second"].values())
        assert row["ceiling"] > row["bound"] or not row["chosen_is_on"]
        assert 0 < sum(row["stage_ms"]) < 1000


def test_decoding_is_compared_with_hf_and_with_the_roofline() -> None:
    measured = importlib.import_module("bench_decode").run_decode(**TINY, residents=[1, 2], prompt_tokens=8, hf="eager")
    for row in measured["rows"]:
        assert set(row["tokens_per_second"]) == {"tide_ray", "HF generate"}
        assert 0 < row["roofline_share"] < 1
    limits = measured["roofline"]["tokens_per_second"]
    assert limits["2"] == pytest.approx(2 * limits["1"], rel=0.3)  # weights are read once for both
