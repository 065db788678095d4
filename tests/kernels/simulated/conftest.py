"""Kernels in Numba's CUDA simulator, which has to be chosen before Numba is imported: ``test_simulated_kernels`` runs
this folder in a process of its own. Elsewhere it is left out.
"""

from __future__ import annotations

import os
import sys

import pytest

IS_SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"
collect_ignore_glob = [] if IS_SIMULATED else ["*.py"]

if IS_SIMULATED:
    import torch
    import turns

    turns.install()

    @pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["float32", "float16", "bfloat16"])
    def dtype(request: pytest.FixtureRequest) -> torch.dtype:
        return request.param

    @pytest.fixture
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    @pytest.fixture(autouse=True)
    def _fresh_kernels() -> None:
        """Tests make blocks smaller, which a kernel that is kept from another test does not know of."""
        for name, module in list(sys.modules.items()):
            if name.startswith("tide_kernels.cuda."):
                for made in vars(module).values():
                    if getattr(made, "__name__", "").endswith("_kernel") and hasattr(made, "cache_clear"):
                        made.cache_clear()

    @pytest.fixture(autouse=True)
    def _kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
        """The public functions take their CUDA path."""
        monkeypatch.setenv("TIDE_KERNELS", "cuda")
        torch.set_num_threads(1)
