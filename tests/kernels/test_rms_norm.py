from __future__ import annotations

import pytest
import torch

from tide_kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7}


def assert_same_but_for_sums_in_another_order(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[expected.dtype], atol=0)
    if expected.dtype == torch.bfloat16:
        assert float((actual != expected).float().mean()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 64, 576])
@pytest.mark.parametrize("shape", [(1,), (1, 5), (2, 3, 4), (70,)])
def test_equals_the_reference(shape: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    rows = (torch.randn(*shape, width, generator=generator) * 30).to(dtype)
    weight = torch.randn(width, generator=generator).to(dtype)
    actual = rms_norm(rows, weight, 1e-5)
    assert actual.shape == rows.shape
    assert_same_but_for_sums_in_another_order(actual, rms_norm_reference(rows, weight, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 5, 70])
def test_the_sum_is_what_torch_adds_and_its_norm_follows(num_rows: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    rows, update = ((torch.randn(1, num_rows, 576, generator=generator) * 9).to(dtype) for _ in range(2))
    weight, before = torch.randn(576, generator=generator).to(dtype), rows.clone()
    total, normed = add_rms_norm(rows, update, weight, 1e-5)
    expected_total, expected = add_rms_norm_reference(rows, update, weight, 1e-5)
    assert torch.equal(total, expected_total)
    assert_same_but_for_sums_in_another_order(normed, expected)
    assert torch.equal(rows, before), "the residual stream may be needed again"


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
        (torch.zeros(2, 32), torch.zeros(32).bfloat16()),
        (torch.zeros(2, 32).half(), torch.zeros(32).half()),
    ],
)
def test_what_does_not_fit_is_refused(rows: torch.Tensor, weight: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="do not fit a weight"):
        rms_norm(rows, weight, 1e-5)
    with pytest.raises(ValueError, match="do not fit"):
        add_rms_norm(torch.zeros(2, 32), torch.zeros(1, 32), torch.zeros(32), 1e-5)
