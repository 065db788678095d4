"""``load``: one line for everything a user can get wrong about a model's place and its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_files import edit_json, error_of


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cuda:", ""])
def test_an_unknown_dtype_or_device_is_named(tiny_llama_folder: Path, device: str) -> None:
    assert error_of(tiny_llama_folder, device=device) == f"device must be auto, cpu, cuda or cuda:N, got {device!r}"
    message = error_of(tiny_llama_folder, dtype="int8")
    assert message == "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"


def test_a_cuda_device_that_is_not_there_is_an_error(tiny_llama_folder: Path) -> None:
    absent = f"cuda:{torch.cuda.device_count()}"
    message = error_of(tiny_llama_folder, device=absent)
    assert message.startswith("device: ")
    assert message.endswith(f"got '{absent}'")


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "./nowhere", "~nobody-here/x", "some/model.gguf", "a/b/c", "x/" * 3000, ""]
)
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(path: str) -> None:
    assert error_of(path) == f"model: no such folder or file, got {path!r}"


def test_a_file_that_is_not_gguf_is_refused(tiny_llama_folder: Path) -> None:
    file = str(tiny_llama_folder / "model.safetensors")
    assert error_of(file) == f"model must be a hub id, a folder, a .gguf file or 'demo', got the file {file!r}"


def test_a_folder_without_config_is_named(llama: Path) -> None:
    (llama / "config.json").unlink()
    assert error_of(llama) == f"model: no config.json in {str(llama)!r}"


def test_a_folder_with_broken_config_is_named(llama: Path) -> None:
    (llama / "config.json").write_text('{"model_type": "llama",')
    message = error_of(llama)
    assert message.startswith("model: not valid JSON")
    assert str(llama / "config.json") in message


def test_a_config_with_a_bad_value_is_one_line(llama: Path) -> None:
    edit_json(llama / "config.json", hidden_size="wide")
    assert "hidden_size" in error_of(llama)


def test_a_folder_without_weights_is_named(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    assert error_of(llama).startswith("model: no weights")


def test_a_missing_shard_is_named(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    shard = "model-00001-of-00002.safetensors"
    edit_json(llama / "model.safetensors.index.json", metadata={}, weight_map={"lm_head.weight": shard})
    assert error_of(llama) == f"model: the weight file {shard!r} of the index is missing in {str(llama)!r}"


def test_truncated_weights_are_one_line(llama: Path) -> None:
    weights = llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = error_of(llama)
    assert message.startswith(f"model: cannot read the weights of {str(llama)!r}: SafetensorError")


def test_a_git_lfs_pointer_says_git_lfs_pull(llama: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (llama / "model.safetensors").write_text(pointer)
    assert "git lfs pull" in error_of(llama)


def test_incomplete_weights_are_refused_instead_of_made_up(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    assert "lack 1 parameters, the first is 'model.layers.3.mlp.up_proj.weight'" in error_of(llama)


def test_weights_of_another_shape_are_one_line(llama: Path) -> None:
    edit_json(llama / "config.json", intermediate_size=96)
    assert error_of(llama).startswith("model: cannot read the weights")


def test_a_broken_tokenizer_is_an_error_not_none(llama: Path) -> None:
    (llama / "tokenizer.json").write_text('{"model": 1}')
    assert error_of(llama).startswith("model: cannot read the tokenizer")
