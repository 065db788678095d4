"""Which architectures are refused, before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from model_files import error_of
from tide_ray.models.supported import is_stateful


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
    llama: Path, config: dict[str, object], expected: str
) -> None:
    (llama / "config.json").write_text(json.dumps(config))
    assert error_of(llama).endswith(expected)


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "rwkv", "recurrent_gemma", "jamba", "qwen3_next", "falcon_h1"])
def test_models_without_a_key_value_cache_are_refused_by_name(llama: Path, kind: str) -> None:
    (llama / "config.json").write_text(json.dumps({"model_type": kind}))
    message = error_of(llama)
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
