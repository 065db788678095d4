from __future__ import annotations

import re

import pytest
import torch

from tide_kernels.layer_vectors import TILE_OUTPUTS
from tide_kernels.tiled_linear import TiledWeights, tiled_linear, tiled_linear_reference

ULP = 2.0**-8
"""Half of the distance between neighbouring bfloat16 numbers, relative: how far rounding may be off."""


def tiled(weight: torch.Tensor, bias: torch.Tensor | None = None) -> TiledWeights:
    num_outputs, num_inputs = weight.shape
    blocks = weight.view(num_outputs // TILE_OUTPUTS, TILE_OUTPUTS, num_inputs // 2, 2)
    return TiledWeights(blocks.permute(0, 2, 1, 3).contiguous(), bias)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_outputs", [64, 192])
@pytest.mark.parametrize("num_inputs", [2, 66, 576])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 9, 12, 13, 35])
def test_equals_the_reference_and_torchs_linear(
    num_rows: int, num_inputs: int, num_outputs: int, has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    weight = torch.randn(num_outputs, num_inputs, generator=generator).bfloat16()
    rows = torch.randn(1, num_rows, num_inputs, generator=generator).bfloat16()
    bias = torch.randn(num_outputs, generator=generator).bfloat16() if has_bias else None
    actual = tiled_linear(rows, tiled(weight, bias))
    exact = rows.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert actual.shape == (1, num_rows, num_outputs)
    tolerance = ULP * exact.abs() + 1e-5 * num_inputs**0.5
    assert bool(((actual.double() - exact).abs() <= tolerance).all())
    reference = tiled_linear_reference(rows, tiled(weight, bias))
    assert float((actual != reference).float().mean()) < 0.01


def test_rows_do_not_depend_on_the_rows_beside_them() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, rows = (
        torch.randn(128, 96, generator=generator).bfloat16(),
        torch.randn(7, 96, generator=generator).bfloat16(),
    )
    together = tiled_linear(rows, tiled(weight))
    alone = torch.cat([tiled_linear(row[None], tiled(weight)) for row in rows])
    assert torch.equal(together, alone)


def test_rounds_to_nearest_even_and_keeps_infinities_and_nan() -> None:
    weight = torch.zeros(64, 2).bfloat16()
    weight[0], weight[1], weight[2] = torch.tensor([1.0, 2.0**-8]), torch.tensor([1.0, 3 * 2.0**-8]), float("inf")
    weight[3, 0] = float("nan")
    out = tiled_linear(torch.ones(1, 2).bfloat16(), tiled(weight))[0]
    assert out[:2].tolist() == [1.0, 1 + 2.0**-6], "1 + 2^-8 and 1 + 3 * 2^-8 lie half-way between two numbers"
    assert out[2] == float("inf")
    assert bool(out[3].isnan())
    assert bool((out[4:] == 0).all())


def test_rows_need_not_be_contiguous() -> None:
    weight, rows = torch.randn(64, 8).bfloat16(), torch.randn(8, 3).bfloat16().T
    expected = tiled_linear_reference(rows, tiled(weight))
    torch.testing.assert_close(tiled_linear(rows, tiled(weight)), expected)


@pytest.mark.parametrize("function", [tiled_linear, tiled_linear_reference])
@pytest.mark.parametrize(
    ("rows", "tiles", "bias", "message"),
    [
        (torch.zeros(1, 6).bfloat16(), torch.zeros(1, 2, 64, 2).bfloat16(), None, "rows (1, 6) do not fit"),
        (torch.zeros(1, 4), torch.zeros(1, 2, 64, 2).bfloat16(), None, "rows must be bfloat16"),
        (
            torch.zeros(1, 4).bfloat16(),
            torch.zeros(1, 2, 32, 2).bfloat16(),
            None,
            "do not fit weights of (1, 2, 32, 2)",
        ),
        (torch.zeros(1, 4).bfloat16(), torch.zeros(1, 64, 2, 2).bfloat16().transpose(1, 2), None, "contiguous"),
        (torch.zeros(1, 4).bfloat16(), torch.zeros(1, 2, 64, 2).bfloat16(), torch.zeros(3).bfloat16(), "bias (3,)"),
    ],
)
def test_what_does_not_fit_is_refused(
    function: object, rows: torch.Tensor, tiles: torch.Tensor, bias: torch.Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        function(rows, TiledWeights(tiles, bias))  # type: ignore[operator]
