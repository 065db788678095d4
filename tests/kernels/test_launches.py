"""What a launch hands to Numba, with a device that is made up."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tide_kernels import gpu

pytestmark = pytest.mark.skipif(gpu.why_no_compiler() is not None, reason=str(gpu.why_no_compiler()))


class Compiled:
    """Remembers the configurations that it is launched with."""

    def __init__(self) -> None:
        self.configurations: list[Any] = []

    def __getitem__(self, configuration: Any) -> Any:
        self.configurations.append(configuration)
        return lambda *_arguments: None


def test_launches_on_a_stream_share_its_object_and_do_not_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numba keeps launch configurations by the stream's object; a new one for every launch would never be found."""
    from numba import config

    from tide_kernels.cuda import kernel

    compiled, current = Compiled(), SimpleNamespace(device=0, handle=7)
    monkeypatch.setattr(kernel.cuda, "external_stream", lambda handle: SimpleNamespace(handle=handle))
    monkeypatch.setattr(kernel.cuda, "jit", lambda *_args, **_kwargs: lambda _function: compiled)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current.device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=current.handle))
    made = kernel.Kernel(lambda _x: None, kernel.INT, max_threads=32)
    for current.device, current.handle in ((0, 7), (0, 7), (0, 8), (1, 7)):
        made.launch((1,), 32, torch.zeros(1))
    first, again, other_stream, other_device = (configuration[2] for configuration in compiled.configurations)
    assert first is again
    assert [stream.handle for stream in (first, other_stream, other_device)] == [7, 8, 7]
    assert other_device is not first
    kernel._stream.cache_clear()
    assert config.CUDA_LOW_OCCUPANCY_WARNINGS == 0  # type: ignore[attr-defined]
