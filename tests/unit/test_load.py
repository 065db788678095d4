"""``load``: what it accepts, what it returns, and one line for everything a user can get wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from tide_ray.models.loading import load
from tide_ray.models.supported import is_stateful
from tide_ray.types import UserError
from tiny_models import EOS_ID, TINY_ARCHITECTURES, build_tiny_model, save_tiny_model, tiny_tokenizer


@pytest.fixture
def folder(tiny_llama_folder: Path, tmp_path: Path) -> Path:
    """A tiny llama that a test may damage."""
    return Path(shutil.copytree(tiny_llama_folder, tmp_path / "model"))


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


def error_of(model: str | Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(model, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_folder_loads_as_an_inference_model_with_its_tokenizer(tiny_llama_folder: Path) -> None:
    loaded = load(str(tiny_llama_folder), dtype="float32", device="cpu")
    assert loaded.source == str(tiny_llama_folder)
    assert loaded.revision == "local"
    assert loaded.eos_token_ids == (EOS_ID,)
    assert loaded.dtype == loaded.model.dtype == torch.float32
    assert loaded.device == loaded.model.device == torch.device("cpu")
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.tokenizer is not None
    chat = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "h\u00e9"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|user|>h\u00e9</s><|assistant|>"
    assert loaded.tokenizer.decode(loaded.tokenizer(chat)["input_ids"]) == chat


@pytest.mark.parametrize("arch", TINY_ARCHITECTURES)
def test_every_architecture_survives_save_and_load(arch: str, tmp_path: Path) -> None:
    save_tiny_model(arch, tmp_path)
    loaded = load(tmp_path, dtype="float32", device="cpu")
    ids = torch.arange(3, 43).unsqueeze(0)
    assert torch.equal(loaded.model(ids).logits, build_tiny_model(arch)(ids).logits)
    assert loaded.tokenizer is None


def test_bin_weights_load_when_there_is_no_safetensors(folder: Path) -> None:
    expected = load(folder, dtype="float32", device="cpu").model
    torch.save(expected.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    ids = torch.arange(3, 20).unsqueeze(0)
    assert torch.equal(load(folder, dtype="float32", device="cpu").model(ids).logits, expected(ids).logits)


def write_gguf(path: Path, arch: str = "qwen2") -> torch.nn.Module:
    """Write the tiny qwen2 (whose rows GGUF does not permute) with llama.cpp's tensor names."""
    model = build_tiny_model("qwen2", vocab_size=263)
    config, names = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    vocab = sorted(tiny_tokenizer().get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(token for token, _ in vocab), "ab"])
    writer.add_token_types([gguf.TokenType.CONTROL if i < 6 else gguf.TokenType.NORMAL for i in range(263)])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(EOS_ID)
    for name, weight in model.state_dict().items():
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None
        writer.add_tensor(gguf_name, weight.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def test_gguf_file_loads_with_its_weights_tokenizer_and_eos(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    expected = write_gguf(tmp_path / "tiny.gguf")
    capfd.readouterr()
    loaded = load(tmp_path / "tiny.gguf", dtype="float32", device="cpu")
    assert "it/s" not in capfd.readouterr().err
    ids = torch.arange(3, 60).unsqueeze(0)
    torch.testing.assert_close(loaded.model(ids).logits, expected(ids).logits, atol=1e-4, rtol=1e-4)
    assert loaded.eos_token_ids == (EOS_ID,)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer("hi")["input_ids"] == tiny_tokenizer()("hi")["input_ids"]


def test_gguf_of_an_unknown_architecture_is_one_line(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", arch="nonesuch")
    message = error_of(tmp_path / "tiny.gguf")
    assert str(tmp_path / "tiny.gguf") in message
    assert "nonesuch" in message


def test_broken_gguf_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF is only the beginning")
    assert error_of(tmp_path / "tiny.gguf").startswith(
        f"model: cannot read the configuration of {str(tmp_path / 'tiny.gguf')!r}"
    )


@pytest.mark.parametrize(
    ("in_generation_config", "in_config", "expected"),
    [(5, 6, (5,)), ([5, 7], 6, (5, 7)), (None, [8, 9], (8, 9)), (None, None, (EOS_ID,))],
)
def test_eos_ids_come_from_generation_config_then_config_then_tokenizer(
    folder: Path, in_generation_config: object, in_config: object, expected: tuple[int, ...]
) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=in_generation_config)
    edit_json(folder / "config.json", eos_token_id=in_config)
    assert load(folder, device="cpu").eos_token_ids == expected


def test_no_eos_anywhere_is_an_empty_tuple(tmp_path: Path) -> None:
    save_tiny_model("llama", tmp_path)
    edit_json(tmp_path / "config.json", eos_token_id=None)
    edit_json(tmp_path / "generation_config.json", eos_token_id=None)
    assert load(tmp_path, device="cpu").eos_token_ids == ()


def test_auto_dtype_on_cpu_is_bfloat16_exactly_where_the_cpu_computes_in_it(tiny_llama_folder: Path) -> None:
    flags = Path("/proc/cpuinfo").read_text()
    has_bfloat16 = "avx512_bf16" in flags or "amx_tile" in flags
    loaded = load(tiny_llama_folder, device="cpu")
    assert loaded.dtype == loaded.model.dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_dtype_by_name_does_not_change_the_fingerprint(tiny_llama_folder: Path, name: str) -> None:
    loaded = load(tiny_llama_folder, dtype=name, device="cpu")
    assert loaded.dtype == loaded.model.dtype == getattr(torch, name)
    assert loaded.fingerprint == load(tiny_llama_folder, device="cpu").fingerprint


def test_fingerprint_survives_a_copy_and_volatile_keys(tiny_llama_folder: Path, folder: Path) -> None:
    (folder / "model.safetensors").touch()
    edit_json(folder / "config.json", transformers_version="9.9", _name_or_path="elsewhere", dtype="bfloat16")
    edit_json(folder / "tokenizer_config.json", name_or_path="elsewhere")
    fingerprint = load(folder).fingerprint
    assert fingerprint == load(tiny_llama_folder).fingerprint
    assert len(bytes.fromhex(fingerprint)) == 32


@pytest.mark.parametrize("what", ["weights", "config", "tokenizer", "template", "eos"])
def test_fingerprint_changes_with_whatever_changes_the_output(folder: Path, what: str) -> None:
    before = load(folder).fingerprint
    if what == "weights":
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.2.self_attn.q_proj.weight"] *= 1.01
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    elif what == "config":
        edit_json(folder / "config.json", rms_norm_eps=1e-4)
    elif what == "tokenizer":
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text.replace('"add_prefix_space":false', '"add_prefix_space":true'))
        edit_json(folder / "tokenizer_config.json", add_prefix_space=True)
    elif what == "template":
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    else:
        edit_json(folder / "generation_config.json", eos_token_id=[2, 3])
    assert load(folder).fingerprint != before


def test_loading_is_silent_and_leaves_logging_as_it_was(
    tiny_llama_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity()
    capfd.readouterr()
    load(tiny_llama_folder)
    assert capfd.readouterr() == ("", "")
    assert logging.get_verbosity() == before
    assert logging.is_progress_bar_enabled()


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


def test_a_folder_without_config_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert error_of(folder) == f"model: no config.json in {str(folder)!r}"


def test_a_folder_with_broken_config_is_named(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama",')
    message = error_of(folder)
    assert message.startswith("model: not valid JSON")
    assert str(folder / "config.json") in message


def test_a_config_with_a_bad_value_is_one_line(folder: Path) -> None:
    edit_json(folder / "config.json", hidden_size="wide")
    assert "hidden_size" in error_of(folder)


def test_a_folder_without_weights_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert error_of(folder).startswith("model: no weights")


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    shard = "model-00001-of-00002.safetensors"
    edit_json(folder / "model.safetensors.index.json", metadata={}, weight_map={"lm_head.weight": shard})
    assert error_of(folder) == f"model: the weight file {shard!r} of the index is missing in {str(folder)!r}"


def test_truncated_weights_are_one_line(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = error_of(folder)
    assert message.startswith(f"model: cannot read the weights of {str(folder)!r}: SafetensorError")


def test_a_git_lfs_pointer_says_git_lfs_pull(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_text(pointer)
    assert "git lfs pull" in error_of(folder)


def test_incomplete_weights_are_refused_instead_of_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.3.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lack 1 parameters, the first is 'model.layers.3.mlp.up_proj.weight'" in error_of(folder)


def test_weights_of_another_shape_are_one_line(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=96)
    assert error_of(folder).startswith("model: cannot read the weights")


def test_a_broken_tokenizer_is_an_error_not_none(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 1}')
    assert error_of(folder).startswith("model: cannot read the tokenizer")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "t5"}, "encoder-decoder models are not supported, only decoders, got model type 't5'"),
        ({"model_type": "bart"}, "encoder-decoder models are not supported, only decoders, got model type 'bart'"),
        ({"model_type": "vit"}, "not a causal language model, got model type 'vit'"),
        ({"model_type": "bert"}, "encoders are not causal language models, got model type 'bert'"),
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            "the weights have no language-model head, got architecture 'LlamaForSequenceClassification'",
        ),
        ({"model_type": "bloom"}, "ALiBi position biases are not supported, got model type 'bloom'"),
        ({"model_type": "mpt"}, "ALiBi position biases are not supported, got model type 'mpt'"),
        ({"model_type": "falcon", "alibi": True}, "ALiBi position biases are not supported, got model type 'falcon'"),
        ({"model_type": "nonesuch"}, "has a model type that transformers does not know, got 'nonesuch'"),
        ({}, "has a model type that transformers does not know, got None"),
    ],
)
def test_architectures_that_cannot_run_are_refused_before_reading_weights(
    folder: Path, config: dict[str, object], expected: str
) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    assert error_of(folder).endswith(expected)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "rwkv", "recurrent_gemma", "jamba", "qwen3_next", "falcon_h1"])
def test_models_without_a_key_value_cache_are_refused_by_name(folder: Path, kind: str) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    message = error_of(folder)
    assert message.startswith("model: state-space, linear and other attention without a plain key/value cache")
    assert f"got model type '{kind}'" in message


def test_what_keeps_a_state_is_told_without_importing_it() -> None:
    """For every causal model of transformers: what its source says is what its class says."""
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        config_class = CONFIG_MAPPING[kind]
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
        config = object.__new__(config_class)  # some cannot be made without arguments
        assert is_stateful(config) == bool(getattr(model_class, "_is_stateful", False)), kind


def test_a_class_of_the_users_own_is_asked_itself() -> None:
    """Its source may be a notebook's, or hold other classes; and a configuration may have no model at all."""

    class OwnConfig(LlamaConfig):
        model_type = "tide_test_own"

    class OwnModel(LlamaForCausalLM):
        config_class = OwnConfig
        _is_stateful = True

    OwnConfig.__module__ = "__main__"
    assert not is_stateful(OwnConfig())
    AutoModelForCausalLM.register(OwnConfig, OwnModel)
    assert is_stateful(OwnConfig())


REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class TideConfig(LlamaConfig):
    model_type = "tide_test"

class TideForCausalLM(LlamaForCausalLM):
    config_class = TideConfig
"""


def test_code_that_comes_with_the_weights_runs_only_when_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "tide_modeling.py").write_text(REMOTE_CODE)
    auto_map = {
        "AutoConfig": "tide_modeling.TideConfig",
        "AutoModelForCausalLM": "tide_modeling.TideForCausalLM",
    }
    edit_json(folder / "config.json", model_type="tide_test", architectures=["TideForCausalLM"], auto_map=auto_map)
    message = error_of(folder)
    assert "--trust-remote-code" in message
    assert "'tide_test'" in message
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    loaded = load(folder, trust_remote_code=True, device="cpu")
    assert type(loaded.model).__name__ == "TideForCausalLM"
