"""Tests of this folder need a CUDA device on which the kernels run; elsewhere they say why they do not."""

from __future__ import annotations

import pytest
import torch

from tide_kernels import gpu


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if item.path.is_relative_to(__file__.rpartition("/")[0])]
    reason = gpu.why_not() if here else None
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(autouse=True)
def _kernels_must_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that cannot run is an error here, not torch in its place."""
    monkeypatch.setenv("TIDE_KERNELS", "cuda")
    torch.manual_seed(0)
