from __future__ import annotations

import pytest
import torch

from tide_kernels.compact import (
    gather_rows,
    gather_rows_reference,
    partition,
    partition_reference,
    scatter_rows,
    scatter_rows_reference,
)


@pytest.fixture(autouse=True)
def _few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are more than one block takes at a time."""
    monkeypatch.setattr("tide_kernels.cuda.compact.PARTITION_THREADS", 64)
    monkeypatch.setattr("tide_kernels.cuda.compact.MOVE_THREADS", 32)


@pytest.mark.parametrize("num_rows", [0, 1, 33, 64, 150])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_exits_come_first_and_both_kinds_stay_in_order(generator, num_rows: int, share: float) -> None:
    exits = torch.rand(num_rows, generator=generator) < share
    order, counts = partition(exits)
    expected, expected_counts = partition_reference(exits)
    assert torch.equal(order, expected)
    assert torch.equal(counts, expected_counts)
    assert counts.tolist() == [int(exits.sum()), num_rows - int(exits.sum())]


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.bfloat16, (24,)),
        (torch.float16, (3,)),
        (torch.float32, (300,)),
        (torch.int64, ()),
        (torch.int32, (7,)),
        (torch.bool, (5,)),
        (torch.float32, (2, 2)),
    ],
)
def test_rows_and_metadata_of_any_dtype_move_bit_for_bit(generator, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    rows = torch.randint(0, 255, (9, *shape), generator=generator).to(dtype)
    index = torch.tensor([8, 0, 3, 3, 5])
    assert torch.equal(gather_rows(rows, index), gather_rows_reference(rows, index))
    places, actual, expected = (
        torch.tensor([4, 0, 6]),
        torch.zeros(7, *shape).to(dtype),
        torch.zeros(7, *shape).to(dtype),
    )
    scatter_rows(rows[:3], places, actual)
    scatter_rows_reference(rows[:3], places, expected)
    assert torch.equal(actual, expected)


def test_rows_past_the_count_are_left_alone(generator) -> None:
    rows, index, count = (
        torch.randn(6, 8, generator=generator),
        torch.tensor([5, 1, 2]),
        torch.tensor([2], dtype=torch.int32),
    )
    assert torch.equal(gather_rows(rows, index, count)[:2], rows[[5, 1]])
    out = torch.zeros(6, 8)
    scatter_rows(rows[:3], index, out, count)
    assert torch.equal(out[[5, 1]], rows[:2])
    assert not out[[0, 2, 3, 4]].any()


def test_rows_that_begin_within_sixteen_bytes_are_moved_in_smaller_words(generator) -> None:
    rows = torch.randn(5 * 8 + 1, generator=generator)[1:].view(5, 8)
    assert torch.equal(gather_rows(rows, torch.tensor([4, 2])), rows[[4, 2]])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="bool"):
        partition(torch.zeros(3))
    with pytest.raises(ValueError, match="long"):
        gather_rows(torch.zeros(3, 2), torch.zeros(2).int())
    with pytest.raises(ValueError, match="do not fit"):
        scatter_rows(torch.zeros(3, 2), torch.zeros(2).long(), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="one int32"):
        gather_rows(torch.zeros(3, 2), torch.zeros(2).long(), torch.zeros(2).int())
