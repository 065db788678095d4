from __future__ import annotations

import pytest
import torch

from tide_kernels.rms_norm import rms_norm, rms_norm_reference


@pytest.mark.parametrize("width", [16, 64, 576])
@pytest.mark.parametrize("shape", [(1,), (1, 5), (2, 3, 4)])
def test_equals_the_reference(shape: tuple[int, ...], width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    rows = (torch.randn(*shape, width, generator=generator) * 30).bfloat16()
    weight = torch.randn(width, generator=generator).bfloat16()
    actual, expected = rms_norm(rows, weight, 1e-5), rms_norm_reference(rows, weight, 1e-5)
    assert actual.shape == rows.shape
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=0)
    assert float((actual != expected).float().mean()) < 0.01


def test_eps_counts_in_small_rows_and_a_row_of_zeros_stays_zero() -> None:
    rows = torch.stack([torch.full((16,), 1e-4), torch.zeros(16)]).bfloat16()
    out = rms_norm(rows, torch.ones(16).bfloat16(), 1e-6)
    assert out[0, 0].item() == pytest.approx(1e-4 / (1e-8 + 1e-6) ** 0.5, rel=0.01)
    assert bool((out[1] == 0).all())


def test_nan_stays_in_its_row_and_rows_need_not_be_contiguous() -> None:
    rows = torch.ones(32, 3).bfloat16().T
    rows[1, 4] = float("nan")
    out = rms_norm(rows, torch.ones(32).bfloat16(), 0.0)
    assert out.isnan().all(dim=1).tolist() == [False, True, False]
    assert bool((out[[0, 2]] == 1).all())


@pytest.mark.parametrize(
    ("rows", "weight"),
    [
        (torch.zeros(2, 32).bfloat16(), torch.zeros(16).bfloat16()),
        (torch.zeros(2, 24).bfloat16(), torch.zeros(24).bfloat16()),
        (torch.zeros(2, 32), torch.zeros(32)),
    ],
)
def test_what_does_not_fit_is_refused(rows: torch.Tensor, weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="do not fit a weight"):
        rms_norm(rows, weight, 1e-5)
