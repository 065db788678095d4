"""tide-ray doctor says what runs here and why."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tide_kernels import gpu
from tide_ray import doctor
from tide_ray.cli import app


def findings() -> dict[str, str]:
    return dict(doctor.report())


def test_it_names_versions_devices_and_kernels() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    starts = ["versions", "python", "cpu", "gpus", "device auto", "cpu kernels", "gpu kernels"]
    assert [line[:12].strip() for line in lines] == starts
    assert "tide-ray 0." in lines[0]


def test_it_tells_the_choice_from_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(gpu.VARIABLE, "torch")
    assert findings()["gpu kernels"] == "off: TIDE_KERNELS=torch"
    monkeypatch.setenv(gpu.VARIABLE, "metal")
    assert findings()["gpu kernels"].startswith("off: TIDE_KERNELS must be torch or cuda")
    monkeypatch.delenv(gpu.VARIABLE)
    monkeypatch.setattr(gpu, "why_not", lambda: "there is no driver")
    assert findings()["gpu kernels"] == "off: there is no driver"
    monkeypatch.setattr(gpu, "why_not", lambda: None)
    assert findings()["gpu kernels"].startswith("on (TIDE_KERNELS=auto): route, ")


def test_it_tells_the_kernels_that_the_engine_calls_from_those_that_it_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(gpu.VARIABLE, raising=False)
    monkeypatch.setattr(gpu, "why_not", lambda: None)
    used, _, unused = findings()["gpu kernels"].partition("; ready, but not used by the engine: ")
    folder = Path(doctor.__file__).parent
    source = "\n".join(path.read_text() for path in folder.rglob("*.py") if path.name != "doctor.py")
    for name in used.partition(": ")[2].split(", "):
        called = {"paged_attention": "paged_decode_attention"}.get(name, name)
        assert re.search(rf"(?<![\w.]){called}\(", source), name
    for name in unused.split(", "):
        assert not re.search(rf"(?<![\w.]){name}\(", source), name


def test_kernels_import_without_numba_cuda(tmp_path: Path) -> None:
    """As on a machine that has only the package's own dependencies."""
    code = (
        "import sys; sys.modules['numba_cuda'] = None\n"
        "import tide_kernels.route, tide_kernels.sample, tide_kernels.compact, tide_kernels.exit_project\n"
        "import tide_kernels.kv_write, tide_kernels.paged_attention, tide_kernels.rms_norm, tide_kernels.silu_mul\n"
        "assert not any(name.startswith('numba.cuda.cudadrv') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
