from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from attention_cases import make_case, without_nan

from tide_kernels.gpu import KernelsUnavailable
from tide_kernels.paged_attention import (
    paged_decode_attention,
    paged_decode_attention_reference,
    paged_extend_attention,
    paged_extend_attention_reference,
)
from tide_ray.engine.rows import attends_in_pages

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
PAGE_SIZE = 4


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two warps, and splits of a few tokens."""
    for name, value in (("ATTENTION_WARPS", 2), ("ATTENTION_MIN_TOKENS", 8), ("COMBINE_THREADS", 32)):
        monkeypatch.setattr(f"tide_kernels.cuda.paged_attention.{name}", value)
    monkeypatch.setattr("tide_kernels.cuda.lane_attention.ATTENTION_WARPS", 2)


@pytest.mark.parametrize(
    ("num_heads", "kv_heads", "head_dim"), [(2, 1, 16), (3, 1, 24), (10, 2, 8), (1, 1, 7), (1, 1, 256)]
)
def test_decode_equals_the_reference_and_what_lies_behind_is_not_read(
    dtype, generator, num_heads, kv_heads, head_dim
) -> None:
    lengths = [1, 13]
    case = make_case(PAGE_SIZE, dtype, generator, num_heads, kv_heads, head_dim, lengths, 2)
    counts = torch.tensor(lengths).int()
    actual = paged_decode_attention(*case, counts, scale=0.3)
    expected = paged_decode_attention_reference(*without_nan(case), counts, scale=0.3)
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(("softcap", "window"), [(2.0, 0), (0.0, 5), (3.0, 9)])
def test_softcap_and_window(generator, softcap: float, window: int) -> None:
    case = make_case(PAGE_SIZE, torch.float32, generator, 4, 2, 16, [4, 9, 26], 3)
    counts, options = torch.tensor([4, 9, 26]).int(), {"scale": 0.5, "softcap": softcap, "window": window}
    actual = paged_decode_attention(*case, counts, **options)
    expected = paged_decode_attention_reference(*without_nan(case), counts, **options)
    torch.testing.assert_close(actual, expected, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize(("num_heads", "kv_heads"), [(2, 2), (4, 1), (6, 1)])
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (2.0, 6)])
def test_a_few_rows_of_a_sequence_see_what_they_may(generator, num_heads, kv_heads, softcap, window) -> None:
    """Sequences of 3, 0 and 5 rows; the first's skip positions, as deferred ones do."""
    case = make_case(PAGE_SIZE, torch.float32, generator, num_heads, kv_heads, 16, [11, 1, 5], 8)
    counts = torch.tensor([2, 7, 11, 1, 2, 3, 4, 5]).int()
    starts = torch.tensor([0, 3, 3, 8]).int()
    options = {"max_rows": 5, "scale": 0.5, "softcap": softcap, "window": window}
    actual = paged_extend_attention(*case, starts, counts, **options)
    expected = paged_extend_attention_reference(*without_nan(case), starts, counts, **options)
    torch.testing.assert_close(actual, expected, atol=3e-6, rtol=3e-6)


def test_scores_far_apart_neither_overflow_nor_vanish(generator) -> None:
    query, keys, values, table = without_nan(make_case(PAGE_SIZE, torch.float32, generator, 2, 1, 16, [20], 1))
    counts = torch.tensor([20]).int()
    actual = paged_decode_attention(query * 100, keys, values, table, counts, scale=1.0)
    expected = paged_decode_attention_reference(query * 100, keys, values, table, counts, scale=1.0)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_queries_may_lie_head_by_head_and_a_row_that_is_not_a_number_spoils_no_other(generator) -> None:
    query, keys, values, table = make_case(PAGE_SIZE, torch.float32, generator, 2, 1, 16, [3, 9], 2)
    query[0, 1, 2] = float("nan")
    apart, counts = query.transpose(0, 1).contiguous().transpose(0, 1), torch.tensor([3, 9]).int()
    actual = paged_decode_attention(apart, keys, values, table, counts, scale=0.25)
    together = paged_decode_attention(query, keys, values, table, counts, scale=0.25)
    torch.testing.assert_close(actual, together, atol=0, rtol=0, equal_nan=True)
    assert actual.isnan().any(-1).tolist() == [[False, True], [False, False]]


def test_a_split_of_which_nothing_is_a_number_is_not_lost(generator) -> None:
    """Of 17 tokens in two splits, all of the second."""
    query, keys, values, table = without_nan(make_case(PAGE_SIZE, torch.float32, generator, 1, 1, 8, [17], 1))
    for token in range(9, 17):
        keys[table[0, token // PAGE_SIZE], :, token % PAGE_SIZE] = float("nan")
    out = paged_decode_attention(query, keys, values, table, torch.tensor([17]).int(), scale=0.3)
    assert out.isnan().all()


@pytest.mark.parametrize("length", [3, 20])
def test_scores_of_minus_infinity_count_nothing(generator, length: int) -> None:
    query, keys, values, table = without_nan(make_case(PAGE_SIZE, torch.float32, generator, 1, 1, 8, [length], 1))
    query[:] = 1
    keys[table[0, 0], :, 0] = float("-inf")
    counts = torch.tensor([length]).int()
    actual = paged_decode_attention(query, keys, values, table, counts, scale=0.3)
    assert actual.isfinite().all()
    expected = paged_decode_attention_reference(query, keys, values, table, counts, scale=0.3)
    torch.testing.assert_close(actual, expected, atol=3e-6, rtol=3e-6)


def test_wide_heads_are_named_and_not_attended_in_pages(generator, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(PAGE_SIZE, torch.float32, generator, 1, 1, 264, [3], 1)
    chunk = SimpleNamespace(is_whole=False, start=0, stop=1)
    with pytest.raises(KernelsUnavailable, match="heads of at most 256, not 264"):
        paged_decode_attention(*case, torch.tensor([3]).int(), scale=1.0)
    with pytest.raises(KernelsUnavailable, match="not 264"):
        attends_in_pages(chunk, case[0])
    assert attends_in_pages(chunk, case[0][..., :256])


def test_no_rows_give_nothing() -> None:
    pages = torch.zeros(1, 1, PAGE_SIZE, 8)
    table, none = torch.zeros(0, 1).int(), torch.zeros(0).int()
    assert paged_decode_attention(torch.zeros(0, 2, 8), pages, pages, table, none, scale=1.0).shape == (0, 2, 8)


def test_what_does_not_fit_is_refused(generator) -> None:
    case = make_case(PAGE_SIZE, torch.float32, generator, 2, 1, 16, [3, 9], 2)
    counts = torch.tensor([3, 9]).int()
    with pytest.raises(ValueError, match="row_starts"):
        paged_extend_attention(*case, torch.tensor([0, 1]).int(), counts, max_rows=1, scale=1.0)
    with pytest.raises(ValueError, match="rows do not fit"):
        paged_decode_attention(*case, counts[:1], scale=1.0)
