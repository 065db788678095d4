"""The kernels' benchmark without a GPU: its cases run on a CPU, and sizes outgrow caches and fit into memory."""

from __future__ import annotations

from types import ModuleType

import bench_kernels
import pytest
import torch

from tide_kernels import gpu
from tide_ray.types import UserError


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(bench_kernels, "VOCABULARY", 64)
    return bench_kernels


def test_cases_run_and_bring_their_own_weights(bench: ModuleType) -> None:
    cases = bench.cases(8, 64, 40, torch.float32, device="cpu")
    names = {case.name for case in cases}
    assert {"partition", "rms_norm", "paged_extend_attention", "route", "write_kv_layers"} <= names
    for case in cases:
        first, second = case.make(), case.make()
        case.run(*first)
        if case.reference is not None:
            case.reference(*second)
    route = next(case for case in cases if case.name == "route")
    assert route.make()[1].down.data_ptr() != route.make()[1].down.data_ptr()
    assert route.tide_bytes - route.num_bytes == 7 * 64 * bench.BOTTLENECK * 4


def test_pools_that_are_written_do_not_grow_with_the_context(bench: ModuleType) -> None:
    def pool_bytes(context: int) -> int:
        case = next(c for c in bench.cases(2, 64, context, torch.float16, device="cpu") if c.name == "write_kv_layers")
        return sum(t.nbytes for t in case.make()[:2])

    assert pool_bytes(16) == pool_bytes(4096)


@pytest.mark.parametrize("num_bytes", [1 << 14, 1 << 20, 40 << 20, 8 << 30])
def test_the_calls_of_a_graph_outgrow_the_cache(bench: ModuleType, num_bytes: int) -> None:
    cache = 50 << 20
    assert bench.num_calls(num_bytes, cache) * num_bytes >= bench.CACHES * cache
    assert bench.num_calls(8 << 30, cache) == 1


def test_torch_is_not_measured_in_a_kernels_place(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "why_not", lambda: None)
    monkeypatch.setenv(gpu.VARIABLE, "torch")
    with pytest.raises(UserError, match="TIDE_KERNELS=torch would measure torch"):
        bench.run_kernels(dtype="bfloat16", rows=[1], hidden=64, context=32)


def test_what_does_not_fit_into_memory_is_left_out(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(bench, "replayed", no_memory)
    monkeypatch.setattr(bench, "_free_bytes", lambda: 0)
    monkeypatch.setattr(bench, "_l2_bytes", lambda: 50 << 20)
    case = bench.cases(1, 64, 32, torch.float16, device="cpu")[0]
    assert bench._measured(case, 1e12, with_torch=True)["us"] is None
