"""The Numba CPU kernel and the torch reference against plain softmax attention."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from tide_kernels.paged_attention import paged_decode_attention, paged_decode_attention_reference

PAGE_SIZE = 8


def make_case(
    dtype: torch.dtype, num_heads: int, kv_heads: int, head_dim: int, lengths: list[int], page_size: int = PAGE_SIZE
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Random query and pages; every sequence's pages are scattered over the pool."""
    generator = torch.Generator().manual_seed(len(lengths) * 100 + num_heads)
    width = -(-max(lengths) // page_size)
    num_pages = width * len(lengths) + 3

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    table = torch.randperm(num_pages, generator=generator)[: width * len(lengths)].view(len(lengths), width).int()
    pages = (num_pages, kv_heads, page_size, head_dim)
    return random(len(lengths), num_heads, head_dim), random(*pages), random(*pages), table, torch.tensor(lengths).int()


def plain_attention(
    case: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], scale: float, softcap: float, window: int
) -> Tensor:
    """Row by row, head by head, in float64."""
    query, key_pages, value_pages, table, lengths = case
    out = torch.zeros(query.shape, dtype=torch.float64)
    group = query.shape[1] // key_pages.shape[1]
    for row, length in enumerate(lengths.tolist()):
        keys = torch.cat([key_pages[page] for page in table[row].tolist()], dim=1)[:, :length].double()
        values = torch.cat([value_pages[page] for page in table[row].tolist()], dim=1)[:, :length].double()
        begin = max(0, length - window) if window else 0
        for head in range(query.shape[1]):
            scores = keys[head // group, begin:] @ query[row, head].double() * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            out[row, head] = torch.softmax(scores, 0) @ values[head // group, begin:]
    return out


@pytest.mark.parametrize("attend", [paged_decode_attention, paged_decode_attention_reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 16), (4, 1, 16), (2, 1, 80)])
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (3.0, 0), (0.0, 5), (2.0, 11)])
def test_decode_attention_equals_plain_attention(attend, dtype, num_heads, kv_heads, head_dim, softcap, window) -> None:
    case = make_case(dtype, num_heads, kv_heads, head_dim, [1, 7, 8, 9, 33, 64])
    out = attend(*case, scale=0.3, softcap=softcap, window=window)
    expected = plain_attention(case, 0.3, softcap, window)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_heads", "kv_heads", "head_dim", "page_size"), [(9, 3, 64, 32), (8, 1, 24, 12), (10, 2, 8, 16), (3, 1, 7, 5)]
)
@pytest.mark.parametrize("window", [0, 9])
def test_any_heads_widths_and_pages_are_taken(dtype, num_heads, kv_heads, head_dim, page_size, window) -> None:
    """Vectors are cut from what divides the width and the page, down to single numbers."""
    case = make_case(dtype, num_heads, kv_heads, head_dim, [1, 6, 31, 32, 33, 70], page_size)
    out = paged_decode_attention(*case, scale=0.3, window=window)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.double(), plain_attention(case, 0.3, 0.0, window), atol=tolerance, rtol=tolerance)


def test_what_earlier_owners_left_in_a_page_does_not_leak() -> None:
    """Whole blocks of a page are scored, so stale NaN behind the last token meets weights that must not count."""
    query, keys, values, table, lengths = make_case(torch.float32, 4, 2, 16, [5, 17, 31], page_size=16)
    expected = paged_decode_attention(query, keys, values, table, lengths, scale=0.25)
    for row, length in enumerate(lengths.tolist()):
        last = table[row, length // 16]
        keys[last, :, length % 16 :], values[last, :, length % 16 :] = float("nan"), float("nan")
    assert torch.equal(paged_decode_attention(query, keys, values, table, lengths, scale=0.25), expected)


def test_scores_far_apart_do_not_overflow_or_vanish() -> None:
    query, keys, values, table, lengths = make_case(torch.float32, 4, 2, 16, [40, 3])
    case = (query * 100, keys, values, table, lengths)
    out = paged_decode_attention(*case, scale=1.0)
    torch.testing.assert_close(out.double(), plain_attention(case, 1.0, 0.0, 0), atol=1e-4, rtol=1e-4)


LARGE_SCRIPT = """
import torch
from tide_kernels.paged_attention import paged_decode_attention, paged_decode_attention_reference
generator = torch.Generator().manual_seed(0)
pages = torch.randn(128, 1, 32, 64, generator=generator).bfloat16()
query = torch.randn(3, 16, 64, generator=generator).bfloat16()
case = query, pages, pages, torch.arange(128).int().repeat(3, 1), torch.tensor([4096, 4001, 3000]).int()
actual = paged_decode_attention(*case, scale=0.125)
torch.testing.assert_close(actual, paged_decode_attention_reference(*case, scale=0.125), rtol=0.02, atol=0.01)
"""


def test_scores_stay_in_memory_while_values_are_summed() -> None:
    """Numba freed them early: with more than 128 KB of them glibc unmaps, and the process crashed."""
    subprocess.run([sys.executable, "-c", LARGE_SCRIPT], check=True, capture_output=True, timeout=120)


def test_a_row_is_the_same_alone_and_among_others() -> None:
    query, keys, values, table, lengths = make_case(torch.bfloat16, 9, 3, 64, [5, 17, 40])
    together = paged_decode_attention(query, keys, values, table, lengths, scale=0.125)
    for row in range(3):
        alone = paged_decode_attention(
            query[row : row + 1], keys, values, table[row : row + 1], lengths[row : row + 1], scale=0.125
        )
        assert torch.equal(together[row], alone[0])


def test_pages_outside_the_table_are_never_read() -> None:
    query, keys, values, table, lengths = make_case(torch.float32, 4, 2, 16, [9, 20])
    expected = paged_decode_attention(query, keys, values, table, lengths, scale=0.25)
    unused = np.setdiff1d(np.arange(keys.shape[0]), table.numpy())
    keys[unused], values[unused] = float("nan"), float("nan")
    assert torch.equal(paged_decode_attention(query, keys, values, table, lengths, scale=0.25), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, t, n: (q[:, :3], k, v, t, n), "heads do not fit"),
        (lambda q, k, v, t, n: (q[:1], k, v, t, n), "rows do not fit"),
        (lambda q, k, v, t, n: (q, k, v, t.long(), n), "int32"),
        (lambda q, k, v, t, n: (q.double(), k, v, t, n), "dtypes differ"),
        (lambda q, k, v, t, n: (q[0], k, v, t, n), r"\[N, H, d\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        paged_decode_attention(*change(*make_case(torch.float32, 4, 2, 16, [9, 20])), scale=0.25)
