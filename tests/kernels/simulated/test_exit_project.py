from __future__ import annotations

import pytest
import torch

from tide_kernels.exit_project import LowRankWeights, exit_project, exit_project_reference
from tide_kernels.route import Normalisation

TOLERANCE = {torch.float32: 3e-5, torch.float16: 8e-3, torch.bfloat16: 6e-2}


@pytest.fixture(autouse=True)
def _two_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("EXIT_THREADS", 64), ("CHUNK", 32), ("EXIT_ROWS", 2)):
        monkeypatch.setattr(f"tide_kernels.cuda.exit_project.{name}", value)


def make_case(dtype, generator, num_rows: int, width: int, rank: int):
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    head = LowRankWeights(random(width, rank) / width**0.5, random(rank, width) / rank**0.5, random(width))
    norms = {
        "none": Normalisation(),
        "rms": Normalisation("rms", 1e-5, random(width)),
        "layer": Normalisation("layer", 1e-5, random(width), random(width)),
    }
    slots = torch.randperm(num_rows + 2, generator=generator)[:num_rows]
    return random(num_rows, width), head, norms, slots


@pytest.mark.parametrize("kind", ["none", "rms", "layer"])
@pytest.mark.parametrize(("num_rows", "width", "rank"), [(1, 33, 5), (3, 72, 24)])
def test_rows_are_projected_normalised_and_put_where_they_belong(dtype, generator, kind, num_rows, width, rank) -> None:
    states, head, norms, slots = make_case(dtype, generator, num_rows, width, rank)
    before = torch.randn(num_rows + 2, width, generator=generator).to(dtype)
    actual, expected = before.clone(), before.clone()
    exit_project(states, head, norms[kind], actual, slots)
    exit_project_reference(states, head, norms[kind], expected, slots)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    others = sorted(set(range(num_rows + 2)) - set(slots.tolist()))
    assert torch.equal(actual[others], before[others])


def test_no_rows_and_rows_that_are_not_numbers(generator) -> None:
    states, head, norms, slots = make_case(torch.float32, generator, 3, 40, 8)
    out = torch.zeros(5, 40)
    exit_project(states[:0], head, norms["rms"], out, slots[:0])
    assert not out.any()
    states[1, 3] = float("nan")
    exit_project(states, head, norms["rms"], out, slots)
    assert out[slots].isnan().all(-1).tolist() == [False, True, False]


def test_what_does_not_fit_is_refused(generator) -> None:
    states, head, norms, slots = make_case(torch.float32, generator, 3, 40, 8)
    with pytest.raises(ValueError, match="do not fit a head"):
        exit_project(states, head, norms["rms"], torch.zeros(5, 39), slots)
    with pytest.raises(ValueError, match="slots"):
        exit_project(states, head, norms["rms"], torch.zeros(5, 40), slots.int())
    with pytest.raises(ValueError, match="like the states"):
        exit_project(states.half(), head, norms["rms"], torch.zeros(5, 40), slots)
