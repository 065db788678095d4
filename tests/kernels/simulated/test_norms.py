from __future__ import annotations

import pytest
import torch

from tide_kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from tide_kernels.silu_mul import silu_mul, silu_mul_reference

RELATIVE = {torch.float32: 3e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture(autouse=True)
def _few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (("rms_norm", "NORM_THREADS"), ("silu_mul", "SILU_THREADS")):
        monkeypatch.setattr(f"tide_kernels.cuda.{module}.{name}", 64)


def assert_rounded_alike(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Sums in another order may round a number the other way."""
    torch.testing.assert_close(actual, expected, rtol=RELATIVE[expected.dtype], atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 24), (1, 1), (3, 75), (2, 1, 576)])
def test_norms_equal_the_reference(dtype, generator, shape: tuple[int, ...]) -> None:
    rows, update = (torch.randn(2, *shape, generator=generator) * 20).to(dtype)
    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    assert_rounded_alike(rms_norm(rows, weight, 1e-5), rms_norm_reference(rows, weight, 1e-5))
    total, normed = add_rms_norm(rows, update, weight, 1e-5)
    expected_total, expected = add_rms_norm_reference(rows, update, weight, 1e-5)
    assert torch.equal(total, expected_total)
    assert_rounded_alike(normed, expected)


def test_a_row_that_is_not_a_number_spoils_no_other(dtype, generator) -> None:
    rows = torch.randn(3, 40, generator=generator).to(dtype)
    rows[0, 3], rows[2, 7] = float("nan"), float("inf")
    weight = torch.ones(40, dtype=dtype)
    assert_rounded_alike(rms_norm(rows, weight, 1e-5), rms_norm_reference(rows, weight, 1e-5))


def test_not_a_number_stays_so_whatever_its_bits_are() -> None:
    """Rounded like a number, these two patterns would become infinite and zero."""
    patterns = torch.tensor([0x7F800001, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    from tide_kernels.cuda.elements import bfloat_from_float

    assert [int(bfloat_from_float(value)) for value in patterns.numpy()] == [0x7FC0, 0x7FC0]


@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (3, 2 * 70), (2, 2 * 72)])
def test_gated_rows_equal_the_reference(dtype, generator, shape: tuple[int, ...]) -> None:
    rows = (torch.randn(*shape, generator=generator) * 5).to(dtype)
    if rows.numel() > 100:
        rows[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), -100.0])
    assert_rounded_alike(silu_mul(rows), silu_mul_reference(rows))


def test_rows_need_not_be_contiguous(dtype, generator) -> None:
    rows = torch.randn(32, 3, generator=generator).to(dtype).T
    weight = torch.ones(32, dtype=dtype)
    assert_rounded_alike(rms_norm(rows, weight, 1e-5), rms_norm_reference(rows, weight, 1e-5))
    assert_rounded_alike(silu_mul(rows), silu_mul_reference(rows))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit a weight"):
        rms_norm(torch.zeros(2, 8), torch.zeros(9), 1e-5)
    with pytest.raises(ValueError, match="do not fit an update"):
        add_rms_norm(torch.zeros(2, 8), torch.zeros(1, 8), torch.zeros(8), 1e-5)
    with pytest.raises(ValueError, match="rows must be"):
        silu_mul(torch.zeros(2, 7))
