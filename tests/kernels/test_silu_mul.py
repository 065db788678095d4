from __future__ import annotations

import pytest
import torch

from tide_kernels.silu_mul import silu_mul, silu_mul_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 80, 1536])
@pytest.mark.parametrize("shape", [(1,), (1, 5), (1, 40)])
def test_equals_the_reference(shape: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    rows = (torch.randn(*shape, 2 * width, generator=generator) * 4).to(dtype)
    actual, expected = silu_mul(rows), silu_mul_reference(rows)
    assert actual.shape == (*shape, width)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=0)
    if dtype == torch.bfloat16:
        assert float((actual != expected).float().mean()) < 0.01


def test_large_gates_saturate_and_nan_stays_where_it_is() -> None:
    gates = torch.tensor([100.0, -100.0, -1e30, 1e30, float("nan"), float("inf"), 0.0] + [1.0] * 9)
    out = silu_mul(torch.cat([gates, torch.full((16,), 2.0)]))
    assert out[[0, 3, 6]].tolist() == [200.0, pytest.approx(2e30), 0.0]
    assert out[1].abs() < 1e-30
    assert out[4].isnan()
    assert out[5] == float("inf")
    assert bool(out[7:].isfinite().all())


@pytest.mark.parametrize("rows", [torch.zeros(2, 48), torch.zeros(2, 32).half(), torch.zeros(2, 33)])
def test_what_does_not_fit_is_refused(rows: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="rows must be of"):
        silu_mul(rows)
