"""Who runs on a GPU and who stands in: reasons are named once, and the user's choice is kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from tide_kernels import gpu
from tide_kernels.paged_attention import unfit_heads


class OnGpu:
    """Enough of a tensor that lies on a GPU."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.device, self.dtype = torch.device("cuda", 0), dtype


def pretend_device(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(gpu, "why_no_compiler", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index: capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(gpu.importlib, "import_module", lambda _name: SimpleNamespace(is_available=lambda: True))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No answer is kept from other tests, and none of those given here is kept for them."""
    monkeypatch.delenv(gpu.VARIABLE, raising=False)
    kept = gpu.why_not, gpu.why_no_compiler, gpu._warn
    for cached in kept:
        cached.cache_clear()
    yield
    for cached in kept:
        cached.cache_clear()


def test_tensors_on_a_cpu_never_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpu.VARIABLE, "cuda")
    assert not gpu.run_on(torch.zeros(1))


def test_one_warning_names_the_reason(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(gpu, "why_not", lambda _index: "the driver is missing")
    with caplog.at_level(logging.WARNING):
        assert not gpu.run_on(OnGpu())
        assert not gpu.run_on(OnGpu())
    assert [record.getMessage() for record in caplog.records] == [
        "GPU kernels are off, torch runs in their place: the driver is missing"
    ]


def test_torch_is_kept_to_without_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(gpu.VARIABLE, "torch")
    monkeypatch.setattr(gpu, "why_not", lambda _index: pytest.fail("asked"))
    assert not gpu.run_on(OnGpu())
    assert not caplog.records


def test_kernels_asked_for_by_name_are_not_replaced_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpu.VARIABLE, "cuda")
    monkeypatch.setattr(gpu, "why_not", lambda _index: "the driver is missing")
    with pytest.raises(gpu.KernelsUnavailable, match="TIDE_KERNELS=cuda, but the driver is missing"):
        gpu.run_on(OnGpu())
    monkeypatch.setattr(gpu, "why_not", lambda _index: None)
    assert gpu.run_on(OnGpu())
    with pytest.raises(gpu.KernelsUnavailable, match="not float64"):
        gpu.run_on(OnGpu(torch.float64))
    with pytest.raises(gpu.KernelsUnavailable, match="heads of at most 256, not 512"):
        gpu.run_on(OnGpu(), unfit=unfit_heads(512))
    with pytest.raises(gpu.KernelsUnavailable, match="tensors lie on cuda:0 and cpu"):
        gpu.run_on(OnGpu(), torch.zeros(1))
    monkeypatch.setenv(gpu.VARIABLE, "triton")
    with pytest.raises(ValueError, match="torch or cuda"):
        gpu.run_on(OnGpu())


def test_a_question_during_capture_is_refused_and_not_remembered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    capturing, asked = [True], []
    pretend_device(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(gpu, "_first_failure", asked.append)
    with caplog.at_level(logging.WARNING):
        assert not gpu.run_on(OnGpu())
    assert not asked
    assert "before a CUDA graph was captured" in caplog.text
    monkeypatch.setenv(gpu.VARIABLE, "cuda")
    with pytest.raises(gpu.KernelsUnavailable, match="captured"):
        gpu.run_on(OnGpu())
    capturing[0] = False
    assert gpu.run_on(OnGpu())
    capturing[0] = True
    assert gpu.run_on(OnGpu())
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("capability", "reason"), [((6, 1), "compute capability 6.1"), ((13, 0), "13.0 is outside"), ((9, 0), None)]
)
def test_the_capability_decides(monkeypatch: pytest.MonkeyPatch, capability, reason: str | None) -> None:
    pretend_device(monkeypatch, capability)
    monkeypatch.setattr(gpu, "_first_failure", lambda _device: None)
    actual = gpu.why_not()
    assert actual is None if reason is None else reason in str(actual)


def test_a_machine_without_numba_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(_name: str) -> str:
        raise gpu.PackageNotFoundError

    monkeypatch.setattr(gpu, "version", version)
    assert gpu.why_not() == "numba-cuda is not installed (pip install 'tide-ray[cuda]')"


@pytest.mark.parametrize(("error", "reason"), [(OSError(), "OSError"), (OSError("no file\nmore"), "no file")])
def test_a_numba_cuda_that_cannot_be_imported_is_named(
    monkeypatch: pytest.MonkeyPatch, error: OSError, reason: str
) -> None:
    def broken(_name: str) -> None:
        raise error

    monkeypatch.setattr(gpu, "version", lambda _name: "1")
    monkeypatch.setattr(gpu.importlib, "import_module", broken)
    assert gpu.why_no_compiler() == f"numba-cuda cannot be imported: {reason}"


def test_a_first_kernel_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_name: str) -> None:
        raise OSError("libcuda.so: cannot open\nmore")

    monkeypatch.setattr(gpu, "why_no_compiler", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index: (9, 0))
    monkeypatch.setattr(gpu.importlib, "import_module", broken)
    assert gpu.why_not() == "the first kernel failed: libcuda.so: cannot open"
