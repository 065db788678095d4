"""Models of a known shape with random weights: right for speed, never for quality. Nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from tide_ray import UserError
from tide_ray.models import LoadedModel, load
from tide_ray.models.loading import resolve_device, resolve_dtype

RANDOM = "random:"
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "llama-tiny": {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
}
"""Fields of the published configurations, with positions enough for the benchmarks; ``llama-tiny`` is for tests."""


def open_model(model: str, *, dtype: str) -> LoadedModel:
    """``load``, or ``random:SHAPE`` with weights made on the device.

    Raises:
        UserError: as ``load``; a shape that is not in ``SHAPES``.
    """
    if not model.startswith(RANDOM):
        return load(model, dtype=dtype)
    name = model.removeprefix(RANDOM)
    if name not in SHAPES:
        raise UserError(f"model: random: takes one of {', '.join(SHAPES)}, got {name!r}")
    return random_model(name, dtype=dtype)


def random_model(name: str, *, dtype: str) -> LoadedModel:
    """A model of ``SHAPES`` with the same weights every time; prompts are token ids, and no token ends an answer."""
    device = resolve_device("auto")
    kind = resolve_dtype(dtype, device)
    fields = dict(SHAPES[name])
    config: PretrainedConfig = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=kind).eval().requires_grad_(False)
    return LoadedModel(
        model=model,
        tokenizer=None,
        fingerprint=f"{RANDOM}{name}",
        source=f"{RANDOM}{name}",
        revision="local",
        eos_token_ids=(),
        device=device,
        dtype=kind,
    )
