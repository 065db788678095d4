from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tide_kernels.gpu import KernelsUnavailable
from tide_kernels.route import GateWeights, Normalisation, route, route_reference


@pytest.fixture(autouse=True)
def _narrow_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of few channels are split over blocks, too."""
    monkeypatch.setattr("tide_kernels.cuda.route.ROUTE_MIN_SLICE", 24)


TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def random_gate(generator: torch.Generator, width: int, bottleneck: int, num_features: int) -> GateWeights:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    calibration = torch.tensor([0.3, 1.2, -0.1])
    return GateWeights(
        random(width, bottleneck) / width**0.5, random(bottleneck), random(bottleneck + num_features), calibration
    )


def norm_of(kind: str, width: int, dtype: torch.dtype, generator: torch.Generator) -> Normalisation:
    weight, bias = torch.randn(2, width, generator=generator).to(dtype)
    return {
        "none": Normalisation(),
        "rms": Normalisation("rms", 1e-6),
        "rms with weight": Normalisation("rms", 1e-5, weight),
        "layer": Normalisation("layer", 1e-5, weight, bias),
    }[kind]


@pytest.mark.parametrize("kind", ["none", "rms", "rms with weight", "layer"])
@pytest.mark.parametrize(("num_rows", "width", "bottleneck", "num_features"), [(1, 40, 17, 0), (9, 54, 33, 3)])
def test_scores_and_exits_are_the_references(dtype, generator, kind, num_rows, width, bottleneck, num_features) -> None:
    gate = random_gate(generator, width, bottleneck, num_features)
    states = (torch.randn(num_rows, width, generator=generator) * 3 + 1).to(dtype)
    features = torch.randn(num_rows, num_features, generator=generator) if num_features else None
    thresholds = torch.rand(num_rows, generator=generator)
    norm = norm_of(kind, width, dtype, generator)
    scores, exits = route(states, gate, thresholds, features=features, norm=norm)
    expected, _ = route_reference(states, gate, thresholds, features=features, norm=norm)
    torch.testing.assert_close(scores, expected, atol=TOLERANCE[dtype], rtol=0)
    assert torch.equal(exits, scores >= thresholds)


def test_a_specialised_width_reads_sixteen_bytes_at_a_time(dtype, generator) -> None:
    gate, states = random_gate(generator, 576, 20, 0), torch.randn(1, 576, generator=generator).to(dtype)
    norm, thresholds = Normalisation("rms", 1e-6), torch.full((1,), 0.5)
    scores, _ = route(states, gate, thresholds, norm=norm)
    expected, _ = route_reference(states, gate, thresholds, norm=norm)
    torch.testing.assert_close(scores, expected, atol=TOLERANCE[dtype], rtol=0)


def test_a_score_does_not_depend_on_the_rows_beside_it(generator) -> None:
    """Not by a bit, though a product of these channels is split over four blocks."""
    gate, states = random_gate(generator, 100, 32, 0), torch.randn(9, 100, generator=generator)
    thresholds = torch.zeros(9)
    together, _ = route(states, gate, thresholds)
    alone, _ = route(states[8:], gate, thresholds[8:])
    assert torch.equal(together[8:], alone)


def test_a_wide_bottleneck_is_named_not_replaced_in_silence(generator) -> None:
    gate, states = random_gate(generator, 40, 257, 0), torch.zeros(1, 40)
    with pytest.raises(KernelsUnavailable, match="bottleneck of at most 256, not 257"):
        route(states, gate, None)


def test_only_split_products_take_counters(monkeypatch: pytest.MonkeyPatch, generator) -> None:
    monkeypatch.setattr("tide_kernels.cuda.route.zeroed_counters", lambda *_: pytest.fail("taken"))
    scores, _ = route(torch.randn(1, 40, generator=generator), random_gate(generator, 40, 17, 0), None)
    assert scores.isfinite().all()


def test_all_exit_and_none_exit(generator) -> None:
    gate, states = random_gate(generator, 64, 32, 0), torch.randn(3, 64, generator=generator)
    _, exits = route(states, gate, torch.tensor([0.0, 0.0, float("inf")]))
    assert exits.tolist() == [True, True, False]


def test_rows_that_are_not_numbers_stay_and_spoil_no_other(generator) -> None:
    gate, states = random_gate(generator, 64, 32, 0), torch.randn(4, 64, generator=generator)
    states[1, 5], states[2, 3] = float("nan"), float("inf")
    norm, thresholds = Normalisation("rms", 1e-6), torch.zeros(4)
    scores, exits = route(states, gate, thresholds, norm=norm)
    assert scores.isnan().tolist() == [False, True, True, False]
    assert exits.tolist() == [True, False, False, True]


def test_no_rows_give_no_scores(generator) -> None:
    scores, exits = route(torch.empty(0, 64), random_gate(generator, 64, 32, 0), torch.empty(0))
    assert scores.shape == exits.shape == (0,)


def test_what_does_not_fit_is_refused(generator) -> None:
    gate, states = random_gate(generator, 64, 32, 0), torch.randn(2, 64, generator=generator)
    with pytest.raises(ValueError, match="do not fit a gate"):
        route(states[:, :60], gate, torch.zeros(2))
    with pytest.raises(ValueError, match="norm must be one of"):
        route(states, gate, torch.zeros(2), norm=Normalisation("batch"))
    with pytest.raises(ValueError, match="float32"):
        route(states, gate, torch.zeros(2).half())
    with pytest.raises(ValueError, match="norms must lie on cpu"):
        route(states, gate, torch.zeros(2), norm=Normalisation("rms", 1e-6, torch.ones(64, device="meta")))
