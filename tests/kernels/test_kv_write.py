"""K/V rows land in their pages, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from tide_kernels.kv_write import (
    Rotation,
    write_kv,
    write_kv_layers,
    write_kv_layers_reference,
    write_kv_reference,
)

NUM_PAGES, NUM_HEADS, PAGE_SIZE, WIDTH = 7, 3, 4, 6


@pytest.mark.parametrize("write", [write_kv, write_kv_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_rows_land_where_they_belong_bit_for_bit(write, dtype: torch.dtype, is_transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (NUM_PAGES, NUM_HEADS, PAGE_SIZE, WIDTH)
    before = torch.randn(2, *shape, generator=generator).to(dtype)
    places = torch.randperm(NUM_PAGES * PAGE_SIZE, generator=generator)[:9]
    numbers, offsets = places // PAGE_SIZE, places % PAGE_SIZE
    rows = torch.randn(2, NUM_HEADS, 9, WIDTH, generator=generator).to(dtype).transpose(1, 2)
    key, value = rows if is_transposed else rows.contiguous()
    after = before.clone()
    write(after[0], after[1], numbers, offsets, key, value)
    expected = before.clone()
    for row, (page, offset) in enumerate(zip(numbers.tolist(), offsets.tolist(), strict=True)):
        expected[0, page, :, offset] = key[row]
        expected[1, page, :, offset] = value[row]
    assert torch.equal(after, expected)


def test_rows_that_do_not_fit_are_refused_before_anything_is_written() -> None:
    pages = torch.zeros(2, NUM_PAGES, NUM_HEADS, PAGE_SIZE, WIDTH)
    at, rows = torch.tensor([1, 2]), torch.ones(2, NUM_HEADS, WIDTH)
    with pytest.raises(ValueError, match="rows do not fit"):
        write_kv(pages[0], pages[1], at, at, rows[:1], rows)
    with pytest.raises(ValueError, match="rows do not fit"):
        write_kv(pages[0], pages[1], at, at[:1], rows, rows)
    with pytest.raises(ValueError, match="dtypes differ"):
        write_kv(pages[0], pages[1], at, at, rows.bfloat16(), rows)
    assert not pages.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_rows", [1, 5, 90])
@pytest.mark.parametrize(("layout", "turned"), [(None, 0), ("half", 16), ("half", 8), ("interleaved", 16)])
def test_many_layers_at_once_are_turned_as_the_reference_turns_them(dtype, num_rows: int, layout, turned: int) -> None:
    num_layers, num_heads, head_dim = 4, 3, 16
    generator = torch.Generator().manual_seed(num_rows)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    flat = random(num_rows, num_layers * 2 * num_heads * head_dim)  # as a KV head gives them
    both = flat.unflatten(1, (num_layers, 2, num_heads, head_dim))
    given = flat.clone()
    before = random(2, num_layers + 1, 30, num_heads, 4, head_dim)
    places = torch.randperm(30 * 4, generator=generator)[:num_rows]
    rotation = None if layout is None else Rotation(random(num_rows, turned), random(num_rows, turned), layout)
    actual, expected = before.clone(), before.clone()
    arguments = places // 4, places % 4, both[:, :, 0], both[:, :, 1]
    write_kv_layers(actual[0, 1:], actual[1, 1:], *arguments, rotation=rotation)
    write_kv_layers_reference(expected[0, 1:], expected[1, 1:], *arguments, rotation=rotation)
    assert not torch.equal(actual, before)
    assert torch.equal(actual, expected)
    assert torch.equal(flat, given)
