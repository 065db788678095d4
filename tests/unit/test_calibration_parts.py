"""The parts of a calibration against answers that are known: ridge, gates, thresholds, sampling, boundaries."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tide_ray import UserError
from tide_ray.calibrate.calibrate import candidate_depths
from tide_ray.calibrate.config import CalibrationConfig
from tide_ray.calibrate.corpus import Example, leading, split
from tide_ray.calibrate.gate_training import (
    auc,
    calibrate_scores,
    calibration_error,
    threshold_at,
    train_gate,
)
from tide_ray.calibrate.judge import kv_damages, kv_errors
from tide_ray.calibrate.reservoir import Reservoir
from tide_ray.calibrate.ridge import Sums, fit, low_rank
from tide_ray.calibrate.screen import MAX_KEPT, most_promising
from tide_ray.exits.gates import Gate, PrefillGate, places
from tide_ray.exits.readouts import ExitHead, KVHead
from tide_ray.models.adapter import KVShape


def planted(num_rows: int, seed: int, noise: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    truth = torch.Generator().manual_seed(0)
    weights, bias = torch.randn(6, 4, generator=truth), torch.randn(4, generator=truth)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, 6, generator=generator)
    return x, x @ weights + bias + noise * torch.randn(num_rows, 4, generator=generator)


def test_ridge_finds_a_planted_map_and_states_its_error_on_held_out_rows() -> None:
    train, held = Sums.zeros(6, 4), Sums.zeros(6, 4)
    train.add(*planted(2000, 1))
    held.add(*planted(500, 2))
    weights, _, error = fit(train, held)
    x, y = planted(300, 3, noise=0.0)
    predicted = torch.cat((x, torch.ones(300, 1)), dim=1).double() @ weights
    assert float((predicted - y).norm() / y.norm()) < 0.01
    direct = float(
        ((torch.cat((planted(500, 2)[0], torch.ones(500, 1)), 1).double() @ weights) - planted(500, 2)[1])
        .square()
        .sum()
    )
    # Sums of float32 products leave the small rest of a good fit rounded to about 1e-7 of the whole, by CPU.
    assert error == pytest.approx(direct / float(planted(500, 2)[1].double().square().sum()), abs=1e-6)


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    x, y = planted(1000, 1)
    whole, one, other = (Sums.zeros(6, 4) for _ in range(3))
    whole.add(x, y)
    one.add(x[:300], y[:300])
    other.add(x[300:], y[300:])
    one.merge(other)
    torch.testing.assert_close(one.solve(1e-3), whole.solve(1e-3), rtol=1e-4, atol=1e-6)
    assert one.num_rows == 1000


def test_a_low_rank_map_of_full_rank_is_the_map_itself() -> None:
    sums = Sums.zeros(6, 4)
    sums.add(*planted(1000, 1))
    weights = sums.solve(1e-4)
    down, up = low_rank(sums, weights, 4)
    torch.testing.assert_close(down @ up, weights[:-1])
    down, up = low_rank(sums, weights, 2)
    assert down.shape == (6, 2)
    assert torch.linalg.matrix_rank(down @ up) == 2


def test_a_gate_learns_a_separable_label_and_its_scores_become_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4000, 16, generator=generator)
    odds = 3 * states[:, 0]
    labels = torch.rand(4000, generator=generator) < odds.sigmoid()
    sequences = torch.arange(4000) // 40
    gate = train_gate(
        states[:3000], labels[:3000], sequences[:3000], make=lambda: Gate(states.shape[1], 16), seed=0, is_balanced=True
    )
    calibrate_scores(gate, gate(states[3000:3500]), labels[3000:3500])
    scores = gate.scores(states[3500:]).numpy()
    best_possible = auc(odds[3500:].numpy(), labels[3500:].numpy())
    assert auc(scores, labels[3500:].numpy()) > best_possible - 0.06 > 0.75
    assert calibration_error(scores, labels[3500:].numpy()) < 0.08


def test_the_threshold_is_the_lowest_that_keeps_the_error() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    labels = np.array([True, True, False, True, True])
    assert threshold_at(scores, labels, 0.0) == 0.8
    assert threshold_at(scores, labels, 0.2) == 0.5
    assert threshold_at(scores, labels, 0.25) == 0.5
    assert threshold_at(scores, ~labels, 0.0) == 2.0
    # Rows of one score exit together: the wrong one among them counts.
    assert threshold_at(np.array([0.9, 0.8, 0.8]), np.array([True, True, False]), 0.0) == 0.9


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 6, 60) / 6, rng.random(60) < 0.4
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in scores[labels] for b in scores[~labels]]
    assert auc(scores, labels) == pytest.approx(np.mean(pairs))


def test_a_reservoir_keeps_rows_of_a_long_stream_with_equal_chance_and_together() -> None:
    counts = np.zeros(100)
    for seed in range(300):
        reservoir = Reservoir(10, seed)
        for start in range(0, 100, 7):
            rows = torch.arange(start, min(start + 7, 100))
            reservoir.add(rows.numpy(), number=rows, double=2 * rows)
        kept = reservoir.take("number")
        assert len(kept.unique()) == 10
        assert torch.equal(reservoir.take("double"), 2 * kept)
        counts[kept.numpy()] += 1
    assert counts.sum() == 3000
    assert abs(counts[:10].mean() - 30) < 8
    assert abs(counts[-10:].mean() - 30) < 8


def test_splits_are_disjoint_and_whole() -> None:
    examples = [Example([i], 0) for i in range(40)]
    splits = split(examples, seed=1)
    assert {name: len(part) for name, part in splits.items()} == {"fit": 20, "gate": 10, "calibrate": 5, "test": 5}
    assert sorted(e.token_ids[0] for part in splits.values() for e in part) == list(range(40))
    with pytest.raises(UserError, match="at least 16 answered prompts, got 3"):
        split(examples[:3], seed=1)


def test_candidate_depths_are_inside_the_model() -> None:
    assert candidate_depths(30, []) == [12, 16, 20, 24, 26, 28]
    assert candidate_depths(2, []) == [1]
    assert candidate_depths(30, [20, 10, 20]) == [10, 20]
    with pytest.raises(UserError, match="boundaries must be from 1 to 29, got 30"):
        candidate_depths(30, [30])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompts": ["a"], "text": "b"}, "prompts or text, got both"),
        ({"prompts": ["a"], "num_prompts": 3}, "num_prompts: .*got 3"),
        ({"prompts": ["a"], "kv_policy": "zero"}, "kv_policy: .*got 'zero'"),
        ({"prompts": ["a"], "boundary": [3]}, "unknown field 'boundary'"),
    ],
)
def test_bad_settings_are_refused_by_name(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        CalibrationConfig.build(values)


def test_damage_is_the_error_of_each_layers_keys_and_values_weighted_with_attention() -> None:
    shapes = [KVShape(1, 2), KVShape(1, 2)]
    head = KVHead(3, shapes)
    head.project.weight.data.zero_()
    head.project.bias.data.zero_()
    actual = torch.tensor([[1.0, 1, 1, 1, 2, 2, 2, 2], [0.0, 0, 0, 0, 4, 4, 0, 0]])
    errors = kv_errors(head, torch.zeros(2, 3), actual, torch.full((8,), 2.0), shapes)
    assert errors.tolist() == [[0.5, 2.0], [0.0, 4.0]]
    # Attention covers one layer more, which these rows have run.
    attention = torch.tensor([[9.0, 1.0, 0.5], [9.0, 3.0, 0.25]])
    assert kv_damages(errors, attention).tolist() == [0.75, 0.5]


def test_a_prefill_gate_learns_that_place_decides_even_where_states_say_nothing() -> None:
    """In few-shot prompts the answer looks at the question at the end: judged by K/V error alone, gates stopped it."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3000, 8, generator=generator)
    positions = torch.randint(1, 500, (3000,), generator=generator)
    lengths = torch.full((3000,), 500)
    damages = 40 / (lengths - positions)
    gate = train_gate(
        states,
        damages / (1 + damages),
        torch.arange(3000) // 30,
        make=lambda: PrefillGate(8, 16).start_from(places(positions, lengths), damages),
        seed=0,
        is_balanced=False,
        features=places(positions, lengths),
    )
    at = torch.tensor([10, 250, 495])
    predicted = gate.damages(torch.zeros(3, 8), at, torch.full((3,), 500))
    assert predicted[0] < predicted[1] < predicted[2]
    assert predicted[0] < 0.2 < 0.8 < predicted[2]


def test_a_split_is_read_only_as_far_as_its_rows_are_wanted() -> None:
    examples = [Example(list(range(10)), first_judged) for first_judged in (8, 6, 0, 0)]
    assert leading(examples, 3) == examples[:2]
    assert leading(examples, 6) == examples[:2]
    assert leading(examples, 7) == examples[:3]
    assert leading(examples, 99) == examples


def screen_case(sure: dict[int, list[int]]) -> tuple[dict[int, ExitHead], Reservoir]:
    """Ten tokens; at each depth the head is sure (and right) about those listed, knows nothing of the others."""
    held = Reservoir(10, seed=0)
    knows_nothing = torch.roll(torch.eye(10), 1, 0)
    states = {f"state_{depth}": knows_nothing.clone() for depth in sure}
    for depth, tokens in sure.items():
        states[f"state_{depth}"][tokens] = 20.0 * torch.eye(10)[tokens]
    held.add(np.arange(10), final=20.0 * torch.eye(10), **states)
    heads = {depth: ExitHead(10) for depth in sure}
    for head in heads.values():
        with torch.no_grad():
            head.up.weight.copy_(torch.eye(10))
            head.up.bias.zero_()
    return heads, held


def test_the_screen_prices_a_depth_by_its_surely_right_tokens_and_the_layers_behind_it() -> None:
    heads, held = screen_case({2: [0, 1, 2], 6: list(range(8))})
    kept, savings = most_promising(heads, held, lambda rows: rows, num_layers=8)
    assert savings == pytest.approx({2: 0.3 * 6 / 8, 6: 0.8 * 2 / 8})
    assert kept == [2, 6]


def test_the_screen_keeps_depths_that_save_together_not_three_that_save_the_same() -> None:
    """Alone, depths 24, 26 and 28 saved most on GSM8K, so a screen by that lost 20, where other tokens leave early."""
    heads, held = screen_case({10: [0, 1], 24: list(range(8)), 26: list(range(8)), 28: list(range(9))})
    kept, savings = most_promising(heads, held, lambda rows: rows, num_layers=30)
    assert savings[10] < min(savings[24], 2 * savings[26])
    assert len(kept) == MAX_KEPT
    assert kept == [10, 24, 28]
