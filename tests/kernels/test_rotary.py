from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tide_kernels.rotary import rotate, rotate_reference


def tables(num_rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.arange(num_rows)[:, None] * 10000 ** (-torch.arange(0, width, 2) / width)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "width"), [(3, 64), (2, 80), (1, 6), (4, 128)])
@pytest.mark.parametrize("num_rows", [1, 7, 90])
def test_equals_the_reference_to_the_last_bit(num_rows, num_heads, width, dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    joint = torch.randn(num_rows, (num_heads + 2) * width, generator=generator).to(dtype)
    before = joint.clone()
    cos, sin = tables(num_rows, width, dtype)
    heads = joint[:, width : (num_heads + 1) * width].unflatten(1, (num_heads, width))
    expected = rotate_reference(heads, cos, sin)
    rotate(heads, cos, sin)
    if dtype == torch.bfloat16:
        assert torch.equal(heads, expected)
    else:  # the sum of products may be fused
        torch.testing.assert_close(heads, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(joint[:, :width], before[:, :width]), "what lies beside the heads stays"
    assert torch.equal(joint[:, (num_heads + 1) * width :], before[:, (num_heads + 1) * width :])


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (torch.zeros(3, 2, 8), "do not fit"),
        (torch.zeros(4, 2, 6), "do not fit"),
        (torch.zeros(4, 2, 8).half(), "do not fit"),
        (torch.zeros(2, 4, 8).transpose(0, 1), "one after another"),
    ],
)
def test_what_does_not_fit_is_refused(heads: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rotate(heads, *tables(4, 8, torch.float32))
