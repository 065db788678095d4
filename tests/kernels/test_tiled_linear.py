from __future__ import annotations

import re

import pytest
import torch

from tide_kernels.cpu import launch
from tide_kernels.product_vectors import has_tile_products
from tide_kernels.silu_mul import silu_mul
from tide_kernels.tiled_linear import (
    BLOCK_OUTPUTS,
    TiledWeights,
    _kernels,
    multiply_added,
    tiled_gate,
    tiled_gate_reference,
    tiled_linear,
    tiled_linear_reference,
)

ULP = 2.0**-8
"""Half of the distance between neighbouring bfloat16 numbers, relative: how far rounding may be off."""


def tiled(weight: torch.Tensor, bias: torch.Tensor | None = None, block: int = BLOCK_OUTPUTS[0]) -> TiledWeights:
    num_outputs, num_inputs = weight.shape
    blocks = weight.view(num_outputs // block, block, num_inputs // 2, 2)
    return TiledWeights(blocks.permute(0, 2, 1, 3).contiguous(), bias)


@pytest.mark.parametrize("block", BLOCK_OUTPUTS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("num_outputs", [64, 192])
@pytest.mark.parametrize("num_inputs", [2, 32, 66, 576])
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 9, 12, 13, 16, 17, 35, 64])
def test_equals_the_reference_and_torchs_linear(
    num_rows: int, num_inputs: int, num_outputs: int, has_bias: bool, block: int
) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    weight = torch.randn(num_outputs, num_inputs, generator=generator).bfloat16()
    rows = torch.randn(1, num_rows, num_inputs, generator=generator).bfloat16()
    bias = torch.randn(num_outputs, generator=generator).bfloat16() if has_bias else None
    weights = tiled(weight, bias, block)
    actual = tiled_linear(rows, weights)
    exact = rows.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert actual.shape == (1, num_rows, num_outputs)
    tolerance = ULP * exact.abs() + 1e-5 * num_inputs**0.5
    assert bool(((actual.double() - exact).abs() <= tolerance).all())
    assert float((actual != tiled_linear_reference(rows, weights)).float().mean()) < 0.01


@pytest.mark.parametrize("block", BLOCK_OUTPUTS)
@pytest.mark.parametrize("num_inputs", [66, 576])
@pytest.mark.parametrize("num_rows", [1, 13, 33])
def test_gates_are_the_linear_layers_outputs(num_rows: int, num_inputs: int, block: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    weight = torch.randn(192, num_inputs, generator=generator).bfloat16()
    rows, bias = torch.randn(num_rows, num_inputs).bfloat16(), torch.randn(192).bfloat16()
    weights = tiled(weight, bias, block)
    actual = tiled_gate(rows, weights)
    assert torch.equal(actual, silu_mul(tiled_linear(rows, weights)))
    torch.testing.assert_close(actual, tiled_gate_reference(rows, weights), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("num_rows", [1, 12, 50])
def test_what_is_added_is_added_to_rounded_outputs(num_rows: int) -> None:
    weights = tiled(torch.randn(64, 576).bfloat16())
    rows, addend = torch.randn(num_rows, 576).bfloat16(), torch.randn(num_rows, 64).bfloat16()
    out = torch.empty_like(addend)
    pointers = rows.data_ptr(), weights.address, addend.data_ptr(), out.data_ptr()
    launch(multiply_added, *pointers, num_rows, 288, 64)
    assert torch.equal(out, addend + tiled_linear(rows, weights))


@pytest.mark.parametrize("num_inputs", [66, 96])
def test_rows_do_not_depend_on_the_rows_beside_them(num_inputs: int) -> None:
    """In panels of their own too: the longest batch here has more than one."""
    generator = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(n, num_inputs, generator=generator).bfloat16() for n in (128, 6000))
    together = tiled_linear(rows, tiled(weight))
    for part in (1, 7, 40, 1000):
        apart = torch.cat([tiled_linear(some, tiled(weight)) for some in rows[-2 * part :].split(part)])
        assert torch.equal(together[-2 * part :], apart)


def test_products_of_tiles_and_of_pairs_agree() -> None:
    """The kernel for CPUs without AMX, run on one with it, which no other test does there."""
    if not has_tile_products():
        pytest.skip("this CPU has no tile registers, so the tests above ran the kernel for pairs")
    weights = tiled(torch.randn(192, 576).bfloat16())
    rows = torch.randn(40, 576).bfloat16()
    out = torch.empty(40, 192).bfloat16()
    in_pairs, _, _ = _kernels(uses_tiles=False)
    launch(in_pairs, rows.data_ptr(), weights.address, out.data_ptr(), 40, 288, 192)
    in_tiles = tiled_linear(rows, weights)
    assert float((out != in_tiles).float().mean()) < 0.01
    torch.testing.assert_close(out, in_tiles, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("num_inputs", [2, 64])
def test_rounds_to_nearest_even_and_keeps_infinities_and_nan(num_inputs: int) -> None:
    weight = torch.zeros(64, num_inputs).bfloat16()
    weight[0, :2], weight[1, :2] = torch.tensor([1.0, 2.0**-8]), torch.tensor([1.0, 3 * 2.0**-8])
    weight[2, :2], weight[3, 0] = float("inf"), float("nan")
    out = tiled_linear(torch.ones(1, num_inputs).bfloat16(), tiled(weight))[0]
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
            torch.zeros(1, 2, 16, 2).bfloat16(),
            None,
            "do not fit weights of (1, 2, 16, 2)",
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
