"""``load``: what it accepts and what it returns."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model_files import edit_json, error_of
from tide_ray.models.loading import load
from tiny_models import EOS_ID, TINY_ARCHITECTURES, build_tiny_model, save_tiny_model, tiny_tokenizer


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


def test_bin_weights_load_when_there_is_no_safetensors(llama: Path) -> None:
    expected = load(llama, dtype="float32", device="cpu").model
    torch.save(expected.state_dict(), llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    ids = torch.arange(3, 20).unsqueeze(0)
    assert torch.equal(load(llama, dtype="float32", device="cpu").model(ids).logits, expected(ids).logits)


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
    llama: Path, in_generation_config: object, in_config: object, expected: tuple[int, ...]
) -> None:
    edit_json(llama / "generation_config.json", eos_token_id=in_generation_config)
    edit_json(llama / "config.json", eos_token_id=in_config)
    assert load(llama, device="cpu").eos_token_ids == expected


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


def test_fingerprint_survives_a_copy_and_volatile_keys(tiny_llama_folder: Path, llama: Path) -> None:
    (llama / "model.safetensors").touch()
    edit_json(llama / "config.json", transformers_version="9.9", _name_or_path="elsewhere", dtype="bfloat16")
    edit_json(llama / "tokenizer_config.json", name_or_path="elsewhere")
    fingerprint = load(llama).fingerprint
    assert fingerprint == load(tiny_llama_folder).fingerprint
    assert len(bytes.fromhex(fingerprint)) == 32


@pytest.mark.parametrize("what", ["weights", "config", "tokenizer", "template", "eos"])
def test_fingerprint_changes_with_whatever_changes_the_output(llama: Path, what: str) -> None:
    before = load(llama).fingerprint
    if what == "weights":
        weights = load_file(llama / "model.safetensors")
        weights["model.layers.2.self_attn.q_proj.weight"] *= 1.01
        save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    elif what == "config":
        edit_json(llama / "config.json", rms_norm_eps=1e-4)
    elif what == "tokenizer":
        text = (llama / "tokenizer.json").read_text()
        (llama / "tokenizer.json").write_text(text.replace('"add_prefix_space":false', '"add_prefix_space":true'))
        edit_json(llama / "tokenizer_config.json", add_prefix_space=True)
    elif what == "template":
        (llama / "chat_template.jinja").write_text("{{ messages }}")
    else:
        edit_json(llama / "generation_config.json", eos_token_id=[2, 3])
    assert load(llama).fingerprint != before


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


REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class TideConfig(LlamaConfig):
    model_type = "tide_test"

class TideForCausalLM(LlamaForCausalLM):
    config_class = TideConfig
"""


def test_code_that_comes_with_the_weights_runs_only_when_asked_for(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (llama / "tide_modeling.py").write_text(REMOTE_CODE)
    auto_map = {
        "AutoConfig": "tide_modeling.TideConfig",
        "AutoModelForCausalLM": "tide_modeling.TideForCausalLM",
    }
    edit_json(llama / "config.json", model_type="tide_test", architectures=["TideForCausalLM"], auto_map=auto_map)
    message = error_of(llama)
    assert "--trust-remote-code" in message
    assert "'tide_test'" in message
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    loaded = load(llama, trust_remote_code=True, device="cpu")
    assert type(loaded.model).__name__ == "TideForCausalLM"
