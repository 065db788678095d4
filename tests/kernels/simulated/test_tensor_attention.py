"""Attention by products of tensor cores, which the simulator runs as plain sums."""

from __future__ import annotations

import pytest
import torch
from attention_cases import make_case, without_nan

from tide_kernels.cuda.kernel import Kernel
from tide_kernels.paged_attention import (
    paged_decode_attention,
    paged_decode_attention_reference,
    paged_extend_attention,
    paged_extend_attention_reference,
)

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
PAGE_SIZE = 16


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two warps, and splits of a few tokens."""
    for module in ("paged_attention", "tensor_attention"):
        monkeypatch.setattr(f"tide_kernels.cuda.{module}.ATTENTION_WARPS", 2)
    for name, value in (("ATTENTION_MIN_TOKENS", 24), ("COMBINE_THREADS", 32)):
        monkeypatch.setattr(f"tide_kernels.cuda.paged_attention.{name}", value)


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Modules of the kernels that were launched."""
    names: set[str] = set()
    launch = Kernel.launch

    def noted(kernel: Kernel, *arguments: object) -> None:
        names.add(kernel.function.__module__.rpartition(".")[2])
        launch(kernel, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Kernel, "launch", noted)
    return names


@pytest.mark.parametrize(("num_heads", "kv_heads", "head_dim"), [(8, 2, 64), (3, 1, 64), (7, 1, 128), (9, 1, 64)])
def test_decode_equals_the_reference_and_what_lies_behind_is_not_read(
    dtype, generator, launched, num_heads, kv_heads, head_dim
) -> None:
    """Nine heads of a group take two blocks; 60 tokens are split over two."""
    lengths = [1, 60]
    case = make_case(PAGE_SIZE, dtype, generator, num_heads, kv_heads, head_dim, lengths, 2)
    counts = torch.tensor(lengths).int()
    actual = paged_decode_attention(*case, counts, scale=0.15)
    expected = paged_decode_attention_reference(*without_nan(case), counts, scale=0.15)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert "tensor_attention" in launched


@pytest.mark.parametrize(("softcap", "window"), [(2.0, 0), (0.0, 21), (3.0, 9)])
def test_softcap_and_window(dtype, generator, softcap: float, window: int) -> None:
    case = make_case(PAGE_SIZE, dtype, generator, 4, 2, 64, [4, 40], 2)
    counts, options = torch.tensor([4, 40]).int(), {"scale": 0.15, "softcap": softcap, "window": window}
    actual = paged_decode_attention(*case, counts, **options)
    expected = paged_decode_attention_reference(*without_nan(case), counts, **options)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(("num_heads", "kv_heads"), [(2, 2), (4, 1), (3, 1)])
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (2.0, 6)])
def test_a_few_rows_of_a_sequence_see_what_they_may(dtype, generator, num_heads, kv_heads, softcap, window) -> None:
    """Sequences of 3, 0 and 5 rows; the first's skip positions, as deferred ones do."""
    case = make_case(PAGE_SIZE, dtype, generator, num_heads, kv_heads, 64, [21, 1, 5], 8)
    counts = torch.tensor([2, 17, 21, 1, 2, 3, 4, 5]).int()
    starts = torch.tensor([0, 3, 3, 8]).int()
    options = {"max_rows": 5, "scale": 0.15, "softcap": softcap, "window": window}
    actual = paged_extend_attention(*case, starts, counts, **options)
    expected = paged_extend_attention_reference(*without_nan(case), starts, counts, **options)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_a_row_that_is_not_a_number_spoils_no_other(generator) -> None:
    query, keys, values, table = make_case(PAGE_SIZE, torch.bfloat16, generator, 2, 1, 64, [3, 20], 2)
    query[0, 1, 2] = float("nan")
    actual = paged_decode_attention(query, keys, values, table, torch.tensor([3, 20]).int(), scale=0.15)
    assert actual.isnan().any(-1).tolist() == [[False, True], [False, False]]


def test_scores_of_minus_infinity_count_nothing(generator) -> None:
    query, keys, values, table = without_nan(make_case(PAGE_SIZE, torch.bfloat16, generator, 1, 1, 64, [20], 1))
    query[:] = 1
    keys[table[0, 0], :, 0] = float("-inf")
    counts = torch.tensor([20]).int()
    actual = paged_decode_attention(query, keys, values, table, counts, scale=0.3)
    expected = paged_decode_attention_reference(query, keys, values, table, counts, scale=0.3)
    torch.testing.assert_close(actual, expected, atol=1.6e-2, rtol=1.6e-2)
