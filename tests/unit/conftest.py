"""What tests of this folder share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def llama(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """A tiny llama that a test may damage."""
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))
