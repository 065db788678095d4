from __future__ import annotations

import pytest
import torch

from tide_kernels.rotary import rotate, rotate_reference


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tide_kernels.cuda.rotary.ROTARY_THREADS", 32)


@pytest.mark.parametrize(("num_rows", "num_heads", "width"), [(0, 2, 32), (3, 2, 32), (1, 3, 16), (2, 1, 6)])
def test_heads_turn_in_place_and_what_lies_beside_them_stays(dtype, generator, num_rows, num_heads, width) -> None:
    """The two halves of the tables differ, as a model may have them."""
    joint = torch.randn(num_rows, (num_heads + 2) * width, generator=generator).to(dtype)
    before = joint.clone()
    angles = torch.randn(num_rows, width, generator=generator)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    heads = joint[:, width : (num_heads + 1) * width].unflatten(1, (num_heads, width))
    expected = rotate_reference(heads, cos, sin)
    rotate(heads, cos, sin)
    assert torch.equal(heads, expected)
    assert torch.equal(joint[:, :width], before[:, :width])
    assert torch.equal(joint[:, (num_heads + 1) * width :], before[:, (num_heads + 1) * width :])
