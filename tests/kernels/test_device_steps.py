"""What GPU kernels compute, in torch: the same functions stand in on a CPU, so the engine's steps run there, too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tide_kernels.compact import gather_rows, partition, scatter_rows
from tide_kernels.exit_project import LowRankWeights, exit_project
from tide_kernels.kv_write import HeadNorm, Rotation, write_kv_layers
from tide_kernels.paged_attention import paged_decode_attention, paged_extend_attention
from tide_kernels.route import GateWeights, Normalisation, route
from tide_kernels.sample import SamplingRules, sample_tokens
from tide_ray.engine import sampler
from tide_ray.engine.sampler import Sampler, SamplingRow
from tide_ray.exits.gates import Gate, PrefillGate
from tide_ray.exits.readouts import ExitHead, unit_rms
from tide_ray.types import SamplingParams


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@torch.inference_mode()
@pytest.mark.parametrize("num_tokens", [0, 8])
def test_route_scores_as_the_gates_that_were_calibrated(generator: torch.Generator, num_tokens: int) -> None:
    gate, prefill = Gate(40, 24, num_tokens=num_tokens), PrefillGate(40, 24)
    gate.scale.fill_(1.3)
    gate.offset.fill_(-0.2)
    states, normed = unit_rms(torch.randn(2, 5, 40, generator=generator))
    positions, lengths = torch.tensor([0, 3, 5, 7, 8]), torch.full((5,), 9)
    expected = gate.scores(states, normed), prefill.damages(states, positions, lengths)
    gate.use_kernel()
    prefill.use_kernel()
    torch.testing.assert_close((gate.scores(states, normed), prefill.damages(states, positions, lengths)), expected)


def test_route_normalises_compares_and_leaves_rows_that_are_not_numbers(generator: torch.Generator) -> None:
    gate = GateWeights(*(torch.randn(shape, generator=generator) for shape in ((16, 4), (4,), (4,), (3,))))
    states = torch.randn(3, 16, generator=generator)
    states[1, 2] = float("nan")
    scores, exits = route(states, gate, torch.tensor([0.0, 0.0, 2.0]), norm=Normalisation("rms", 1e-6))
    torch.testing.assert_close(scores[::2], route(unit_rms(states), gate, None)[0][::2])
    assert exits.tolist() == [True, False, False]


def test_rows_are_parted_moved_and_moved_back(generator: torch.Generator) -> None:
    exits, rows = torch.tensor([True, False, False, True, False]), torch.randn(5, 3, generator=generator)
    order, counts = partition(exits)
    assert order.tolist() == [0, 3, 1, 2, 4]
    assert counts.tolist() == [2, 3]
    moved = gather_rows(rows, order)
    assert torch.equal(moved, rows[order])
    back = torch.zeros_like(rows)
    scatter_rows(moved, order, back, counts[:1])
    assert torch.equal(back, torch.where(exits[:, None], rows, 0.0))


def test_exit_project_is_the_low_rank_head_and_the_norm(generator: torch.Generator) -> None:
    head, states = ExitHead(16, rank=4), torch.randn(2, 16, generator=generator)
    down, up = head.down.weight.detach(), head.up.weight.detach()
    norm, out = Normalisation("layer", 1e-5, torch.randn(16), torch.randn(16)), torch.zeros(4, 16)
    exit_project(states, LowRankWeights(down.T, up.T, head.up.bias.detach()), norm, out, torch.tensor([3, 1]))
    expected = torch.nn.functional.layer_norm(head(states), (16,), norm.weight, norm.bias, 1e-5)
    torch.testing.assert_close(out[[3, 1]], expected.detach())
    assert not out[[0, 2]].any()


def test_keys_of_many_layers_are_normalised_turned_and_written(generator: torch.Generator) -> None:
    pools = torch.zeros(2, 3, 4, 2, 4, 8)
    keys, values = torch.randn(2, 5, 3, 2, 8, generator=generator)
    places, angles = torch.randperm(16, generator=generator)[:5], torch.randn(5, 4, generator=generator)
    rotation = Rotation(angles.cos(), angles.sin(), "interleaved", repeats=True)
    norm = HeadNorm(torch.randn(8, generator=generator), 1e-6)
    write_kv_layers(*pools, places // 4, places % 4, keys, values, rotation=rotation, norm=norm)
    for row, place in enumerate(places.tolist()):
        assert torch.equal(pools[1, :, place // 4, :, place % 4], values[row])
        pairs = torch.view_as_complex(norm(keys)[row, ..., :4].unflatten(-1, (2, 2)))
        turns = torch.polar(torch.ones(2), angles[row, :2])
        turned = torch.view_as_real(pairs * turns).flatten(-2)
        torch.testing.assert_close(pools[0, :, place // 4, :, place % 4, :4], turned)


def test_a_few_rows_attend_as_each_would_alone(generator: torch.Generator) -> None:
    query, pages = torch.randn(5, 4, 16, generator=generator), torch.randn(2, 6, 2, 4, 16, generator=generator)
    table, starts = torch.tensor([[5, 1], [0, 2]]).int(), torch.tensor([0, 3, 5]).int()
    lengths = torch.tensor([2, 5, 8, 3, 4]).int()
    together = paged_extend_attention(query, *pages, table, starts, lengths, max_rows=3, scale=0.25)
    by_row = table[[0, 0, 0, 1, 1]]
    assert torch.equal(together, paged_decode_attention(query, *pages, by_row, lengths, scale=0.25))


def test_the_sampler_chooses_the_same_in_one_launch(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """Greedy, all filters, penalties and suppression, alone and mixed; seeds of any size."""
    logits = torch.randn(60, 500, generator=generator) * 3
    choices = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 9},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 2.0, "top_k": 40, "top_p": 0.7, "min_p": 0.1},
        {"temperature": 1.0, "repetition_penalty": 1.5},
    ]
    rows = [
        SamplingRow(
            SamplingParams(**choices[n % 6]), seed=n**9 - 5, position=n, token_ids=[n, 2 * n], suppressed=(7,) * (n % 2)
        )
        for n in range(60)
    ]
    expected = Sampler().sample(logits, rows).token_ids
    with torch.inference_mode():
        assert sampler._chosen_in_one_launch(logits, rows).tolist() == expected


def test_sampled_tokens_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(20000, 3)
    ones, numbers = torch.ones(20000), torch.arange(20000)
    tokens = sample_tokens(
        logits, SamplingRules(ones, torch.zeros_like(numbers).int(), ones, ones * 0, numbers, numbers)
    )
    shares = np.bincount(tokens.numpy(), minlength=3) / 20000
    np.testing.assert_allclose(shares, torch.softmax(logits[0], 0).numpy(), atol=0.01)
