from __future__ import annotations

import pytest
import torch

from tide_kernels.kv_write import (
    HeadNorm,
    Rotation,
    write_kv,
    write_kv_layers,
    write_kv_layers_reference,
    write_kv_reference,
)

NUM_LAYERS, NUM_PAGES, NUM_HEADS, PAGE_SIZE = 2, 5, 3, 4
NORM_TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def make_case(dtype, generator, num_rows: int, head_dim: int):
    pools = torch.randn(2, 3, NUM_PAGES, NUM_HEADS, PAGE_SIZE, head_dim, generator=generator).to(dtype)
    places = torch.randperm(NUM_PAGES * PAGE_SIZE, generator=generator)[:num_rows]
    # K and V of each layer lie side by side, as one product gives them, behind columns of other layers.
    flat = torch.randn(num_rows, 16 + NUM_LAYERS * 2 * NUM_HEADS * head_dim, generator=generator).to(dtype)
    both = flat[:, 16:].unflatten(1, (NUM_LAYERS, 2, NUM_HEADS, head_dim))
    return pools, places // PAGE_SIZE, places % PAGE_SIZE, both[:, :, 0], both[:, :, 1]


def tables(dtype, generator, num_rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.randn(num_rows, width, generator=generator)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def both_ways(case, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Pools after the kernel and after the reference; only the middle and last layer of three are written."""
    pools, pages, offsets, keys, values = case
    actual, expected = pools.clone(), pools.clone()
    write_kv_layers(actual[0, 1:], actual[1, 1:], pages, offsets, keys, values, **options)
    write_kv_layers_reference(expected[0, 1:], expected[1, 1:], pages, offsets, keys, values, **options)
    return actual, expected


@pytest.mark.parametrize(("num_rows", "head_dim"), [(0, 16), (1, 16), (3, 24), (2, 7)])
def test_rows_without_rotation_are_copied_bit_for_bit(dtype, generator, num_rows: int, head_dim: int) -> None:
    case = make_case(dtype, generator, num_rows, head_dim)
    if num_rows:
        case[3][0, 0, 0, 0], case[4][0, 1, 2, 3] = float("nan"), float("inf")
    actual, expected = both_ways(case)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(actual.view(bits), expected.view(bits))


@pytest.mark.parametrize(("head_dim", "width"), [(16, 16), (32, 16), (10, 6)])
@pytest.mark.parametrize(("layout", "repeats"), [("half", False), ("interleaved", False), ("interleaved", True)])
def test_rotated_keys_are_the_references_bit_for_bit(dtype, generator, head_dim, width, layout, repeats) -> None:
    case = make_case(dtype, generator, 3, head_dim)
    rotation = Rotation(*tables(dtype, generator, 3, width), layout, repeats)
    actual, expected = both_ways(case, rotation=rotation)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(("head_dim", "width"), [(16, 16), (10, 6), (24, 0)])
def test_heads_are_normalised_before_they_are_turned(dtype, generator, head_dim: int, width: int) -> None:
    case = make_case(dtype, generator, 2, head_dim)
    norm = HeadNorm(torch.randn(head_dim, generator=generator).to(dtype), 1e-5)
    rotation = Rotation(*tables(dtype, generator, 2, width)) if width else None
    actual, expected = both_ways(case, rotation=rotation, norm=norm)
    torch.testing.assert_close(actual, expected, atol=NORM_TOLERANCE[dtype], rtol=NORM_TOLERANCE[dtype])


@pytest.mark.parametrize("is_transposed", [False, True])
def test_one_layers_rows_land_bit_for_bit(dtype, generator, is_transposed: bool) -> None:
    pools, pages, offsets, _, _ = make_case(dtype, generator, 3, 8)
    rows = torch.randn(2, NUM_HEADS, 3, 8, generator=generator).to(dtype).transpose(1, 2)
    key, value = rows if is_transposed else rows.contiguous()
    actual, expected = pools[:, 0].clone(), pools[:, 0].clone()
    write_kv(actual[0], actual[1], pages, offsets, key, value)
    write_kv_reference(expected[0], expected[1], pages, offsets, key, value)
    assert torch.equal(actual, expected)


def test_what_does_not_fit_is_refused(generator) -> None:
    pools, pages, offsets, keys, values = make_case(torch.float32, generator, 2, 8)
    pair = pools[0, 1:], pools[1, 1:]
    with pytest.raises(ValueError, match="rows do not fit"):
        write_kv_layers(*pair, pages, offsets, keys[:, :1], values)
    with pytest.raises(ValueError, match="dtypes differ"):
        write_kv_layers(*pair, pages, offsets, keys.half(), values)
    with pytest.raises(ValueError, match="rotary tables"):
        write_kv_layers(*pair, pages, offsets, keys, values, rotation=Rotation(torch.zeros(3, 8), torch.zeros(3, 8)))
    with pytest.raises(ValueError, match="norm"):
        write_kv_layers(*pair, pages, offsets, keys, values, norm=HeadNorm(torch.ones(7), 1e-5))
    with pytest.raises(ValueError, match="rows do not fit"):
        write_kv_layers(pair[0], pair[1][:, 1:], pages, offsets, keys, values)
    with pytest.raises(ValueError, match="rows do not fit"):
        write_kv(pools[0, 0], pools[1, 0, 1:], pages, offsets, keys[:, 0], values[:, 0])


@pytest.mark.parametrize(
    ("width", "layout", "device", "message"),
    [
        (8, "half", "meta", "must lie on cpu"),
        (7, "half", "cpu", "rotary tables"),
        (8, "neox", "cpu", "layout must be one of"),
    ],
)
def test_a_rotation_that_does_not_fit_is_refused(generator, width, layout, device, message) -> None:
    pools, pages, offsets, keys, values = make_case(torch.float32, generator, 2, 8)
    table = torch.zeros(2, width)
    rotation = Rotation(table, table.to(device), layout)
    with pytest.raises(ValueError, match=message):
        write_kv_layers(pools[0, 1:], pools[1, 1:], pages, offsets, keys, values, rotation=rotation)


def test_a_norm_on_another_device_is_refused(generator) -> None:
    pools, pages, offsets, keys, values = make_case(torch.float32, generator, 2, 8)
    norm = HeadNorm(torch.ones(8, device="meta"), 1e-5)
    with pytest.raises(ValueError, match="must lie on cpu"):
        write_kv_layers(pools[0, 1:], pools[1, 1:], pages, offsets, keys, values, norm=norm)
