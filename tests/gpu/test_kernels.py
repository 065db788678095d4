"""Every kernel on the device against its torch reference, at sizes that the simulator is too slow for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tide_kernels import compact, exit_project, kv_write, paged_attention, rms_norm, rotary, route, sample, silu_mul

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
WIDTHS = [576, 768, 1024, 2048, 2560, 3072, 3584, 4096, 5120, 8192, 100, 1000]
ROWS = [0, 1, 7, 129]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def assert_alike(actual: object, expected: object, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True)


@pytest.mark.parametrize("width", WIDTHS)
def test_norms_and_gated_rows(dtype: torch.dtype, width: int) -> None:
    weight = random(width, dtype=dtype)
    for num_rows in ROWS:
        rows, update = random(num_rows, width, dtype=dtype), random(num_rows, width, dtype=dtype)
        assert_alike(rms_norm.rms_norm(rows, weight, 1e-5), rms_norm.rms_norm_reference(rows, weight, 1e-5), dtype)
        actual = rms_norm.add_rms_norm(rows, update, weight, 1e-5)
        assert_alike(actual, rms_norm.add_rms_norm_reference(rows, update, weight, 1e-5), dtype)
        both = torch.cat((rows, update), dim=-1)
        assert_alike(silu_mul.silu_mul(both), silu_mul.silu_mul_reference(both), dtype)


@pytest.mark.parametrize(("num_heads", "width"), [(40, 128), (12, 64), (3, 80), (1, 6)])
def test_heads_turn_in_place(dtype: torch.dtype, num_heads: int, width: int) -> None:
    for num_rows in ROWS:
        joint = random(num_rows, (num_heads + 8) * width, dtype=dtype)
        heads, angles = joint[:, : num_heads * width].unflatten(1, (num_heads, width)), random(num_rows, width)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        expected, beside = rotary.rotate_reference(heads, cos, sin), joint[:, num_heads * width :].clone()
        rotary.rotate(heads, cos, sin)
        assert_alike(heads, expected, dtype)
        assert torch.equal(joint[:, num_heads * width :], beside)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["none", "rms", "layer"])
def test_route(dtype: torch.dtype, width: int, kind: str) -> None:
    weight = None if kind == "none" else random(width, dtype=dtype)
    norm = route.Normalisation(kind, 1e-5, weight, weight if kind == "layer" else None)
    gate = route.GateWeights(random(width, 128) / width**0.5, random(128), random(131) / 8, random(3))
    for num_rows in (*ROWS, *ROWS):  # again, as counters must be zero by then
        states, features = random(num_rows, width, dtype=dtype), random(num_rows, 3)
        thresholds = torch.rand(num_rows).cuda()
        scores, exits = route.route(states, gate, thresholds, features=features, norm=norm)
        expected, _ = route.route_reference(states, gate, thresholds, features=features, norm=norm)
        assert_alike(scores, expected, dtype)
        assert torch.equal(exits, scores >= thresholds)


@pytest.mark.parametrize("num_rows", [0, 1, 511, 512, 5000])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_rows_are_parted_and_moved(dtype: torch.dtype, num_rows: int, share: float) -> None:
    exits = torch.rand(num_rows, device="cuda") < share
    order, counts = compact.partition(exits)
    expected, expected_counts = compact.partition_reference(exits)
    assert torch.equal(order, expected)
    assert torch.equal(counts, expected_counts)
    for rows in (random(num_rows, 576, dtype=dtype), torch.arange(num_rows, device="cuda")):
        assert torch.equal(compact.gather_rows(rows, order), rows[order])
        out = torch.zeros_like(rows)
        compact.scatter_rows(rows, order, out)
        assert torch.equal(out[order], rows)


@pytest.mark.parametrize("rank", [64, 128, 256])
@pytest.mark.parametrize("num_rows", [1, 9, 130])
@pytest.mark.parametrize("kind", ["none", "rms", "layer"])
def test_exit_project(dtype: torch.dtype, rank: int, num_rows: int, kind: str) -> None:
    width = 2048
    weight = None if kind == "none" else random(width, dtype=dtype)
    norm = route.Normalisation(kind, 1e-5, weight, weight if kind == "layer" else None)
    down, up = random(width, rank) / width**0.5, random(rank, width) / rank**0.5
    head = exit_project.LowRankWeights(down.to(dtype), up.to(dtype), random(width, dtype=dtype))
    states, slots = random(num_rows, width, dtype=dtype), torch.randperm(num_rows + 3, device="cuda")[:num_rows]
    actual, expected = torch.zeros(2, num_rows + 3, width, device="cuda", dtype=dtype)
    exit_project.exit_project(states, head, norm, actual, slots)
    exit_project.exit_project_reference(states, head, norm, expected, slots)
    torch.testing.assert_close(actual, expected, atol=4 * TOLERANCE[dtype], rtol=4 * TOLERANCE[dtype])


@pytest.mark.parametrize(("head_dim", "turned"), [(64, 64), (128, 128), (256, 64), (80, 32)])
@pytest.mark.parametrize("layout", ["none", "half", "interleaved"])
@pytest.mark.parametrize("is_normed", [False, True])
def test_kv_write(dtype: torch.dtype, head_dim: int, turned: int, layout: str, is_normed: bool) -> None:
    num_rows, layers, heads = 37, 3, 4
    pools = random(2, layers, 9, heads, 16, head_dim, dtype=dtype)
    places = torch.randperm(9 * 16, device="cuda")[:num_rows]
    flat = random(num_rows, layers * 2 * heads * head_dim, dtype=dtype).unflatten(1, (layers, 2, heads, head_dim))
    angles = random(num_rows, turned)
    options = {
        "rotation": None if layout == "none" else kv_write.Rotation(angles.cos(), angles.sin(), layout),
        "norm": kv_write.HeadNorm(random(head_dim, dtype=dtype), 1e-6) if is_normed else None,
    }
    actual, expected = pools.clone(), pools.clone()
    at = places // 16, places % 16
    kv_write.write_kv_layers(*actual, *at, flat[:, :, 0], flat[:, :, 1], **options)
    kv_write.write_kv_layers_reference(*expected, *at, flat[:, :, 0], flat[:, :, 1], **options)
    assert_alike(actual, expected, dtype)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 100, 128, 192, 256])
@pytest.mark.parametrize(("num_heads", "kv_heads"), [(4, 4), (9, 3), (28, 4), (8, 1)])
def test_attention(dtype: torch.dtype, head_dim: int, num_heads: int, kv_heads: int) -> None:
    for softcap, window in ((0.0, 0), (20.0, 0), (0.0, 100)):
        for lengths in ([1], [1, 17, 333, 2000], [900] * 40):
            check_attention(dtype, head_dim, num_heads, kv_heads, softcap, window, lengths)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_tensor_cores_are_used(head_dim: int, kind: torch.dtype) -> None:
    """A probe that fails would leave them out with a warning, and everything else would pass."""
    from tide_kernels.cuda.paged_attention import products_are_right
    from tide_kernels.cuda.tensor_attention import takes_products

    device = torch.device("cuda", 0)
    if torch.cuda.get_device_capability(device) >= (8, 0):
        assert takes_products(device, kind, head_dim, 32)
        assert products_are_right(device, kind, head_dim)


def check_attention(
    dtype: torch.dtype, head_dim: int, num_heads: int, kv_heads: int, softcap: float, window: int, lengths: list[int]
) -> None:
    page_size = 32
    width = -(-max(lengths) // page_size)
    pool = width * len(lengths), kv_heads, page_size, head_dim
    table = torch.randperm(pool[0], device="cuda").int().view(len(lengths), width)
    pages, counts = (random(*pool, dtype=dtype), random(*pool, dtype=dtype)), torch.tensor(lengths).int().cuda()
    options = {"scale": head_dim**-0.5, "softcap": softcap, "window": window}
    query = random(len(lengths), num_heads, head_dim, dtype=dtype)
    actual = paged_attention.paged_decode_attention(query, *pages, table, counts, **options)
    expected = paged_attention.paged_decode_attention_reference(query, *pages, table, counts, **options)
    assert_alike(actual, expected, dtype)
    each = min(5, min(lengths))
    starts = torch.arange(len(lengths) + 1, device="cuda").int() * each
    ends = (counts[:, None] - torch.arange(each - 1, -1, -1, device="cuda")).flatten().int()
    query, few = random(len(ends), num_heads, head_dim, dtype=dtype), {"max_rows": each, **options}
    actual = paged_attention.paged_extend_attention(query, *pages, table, starts, ends, **few)
    expected = paged_attention.paged_extend_attention_reference(query, *pages, table, starts, ends, **few)
    assert_alike(actual, expected, dtype)


@pytest.mark.parametrize("vocabulary", [49152, 128256, 50257])
@pytest.mark.parametrize(
    "knobs", [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.8, 50, 1.0, 0.0), (0.8, 0, 0.9, 0.0), (1.2, 200, 0.8, 0.05)]
)
def test_sampling(dtype: torch.dtype, vocabulary: int, knobs: tuple[float, int, float, float]) -> None:
    """Tokens are the reference's but where exp's last bit moves a limit, which is rare."""
    num_rows = 64
    temperature, top_k, top_p, min_p = (torch.full((num_rows,), float(knob), device="cuda") for knob in knobs)
    numbers = torch.arange(num_rows, device="cuda")
    rules = sample.SamplingRules(temperature, top_k.int(), top_p, min_p, numbers * 7919, numbers % 5)
    logits = random(num_rows, vocabulary, dtype=dtype) * 3
    actual, expected = sample.sample_tokens(logits, rules), sample.sample_tokens_reference(logits, rules)
    assert int((actual != expected).sum()) <= (0 if knobs[0] == 0 else 2)
    assert torch.equal(actual, sample.sample_tokens(logits, rules)), "the same every time"
