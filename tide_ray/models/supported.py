"""Which architectures run at all, decided from the configuration before any weight is read.

The engine pages one K and one V vector per token and layer and masks by position alone, so it refuses models that keep
another state, look ahead, or bias scores by distance. What passes here is still checked by the self-check at load.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, PreTrainedConfig

from tide_ray.types import UserError

ATTENTION_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
ALIBI_MODEL_TYPES = frozenset({"bloom", "mpt"})
_OTHER_HEAD = re.compile(r"For(Sequence|Token)Classification|ForQuestionAnswering|ForMaskedLM|ForMultipleChoice")


def check_supported(config: PreTrainedConfig) -> None:
    """Refuse an architecture that the engine cannot run.

    Raises:
        UserError: encoder-decoder, not a causal language model, state-space or linear attention, or ALiBi.
    """
    kind = config.model_type
    if config.is_encoder_decoder:
        raise UserError(f"model: encoder-decoder models are not supported, only decoders, got model type {kind!r}")
    _check_causal(config)
    _check_attention(config)
    if (
        kind in ALIBI_MODEL_TYPES
        or getattr(config, "alibi", False)
        or getattr(config, "position_embedding_type", None) == "alibi"
    ):
        raise UserError(f"model: ALiBi position biases are not supported, got model type {kind!r}")


def _check_causal(config: PreTrainedConfig) -> None:
    kind = config.model_type
    brings_own_class = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not brings_own_class:
        raise UserError(f"model: not a causal language model, got model type {kind!r}")
    # Encoders such as BERT have a class in the causal mapping, but attend in both directions unless told otherwise.
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise UserError(f"model: encoders are not causal language models, got model type {kind!r}")
    architectures = getattr(config, "architectures", None) or []
    if architectures and all(_OTHER_HEAD.search(name) for name in architectures):
        raise UserError(f"model: the weights have no language-model head, got architecture {architectures[0]!r}")


def _check_attention(config: PreTrainedConfig) -> None:
    layer_types = getattr(config.get_text_config(decoder=True), "layer_types", None)
    if layer_types:
        other = sorted(set(layer_types) - ATTENTION_LAYER_TYPES)
        detail = f" with {', '.join(other)} layers"
    else:
        other = ["recurrent"] if is_stateful(config) else []
        detail = ""
    if other:
        raise UserError(
            "model: state-space, linear and other attention without a plain key/value cache is not supported, "
            f"got model type {config.model_type!r}{detail}"
        )


def is_stateful(config: PreTrainedConfig) -> bool:
    """``_is_stateful`` of the model's class, which for one of transformers' own is read from its source.

    A job's driver asks as well, and importing the class takes as long as all else that a driver imports.
    """
    module = type(config).__module__
    if not module.startswith("transformers.models."):  # then the class was registered by a user, or there is none
        return bool(getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None), "_is_stateful", False))
    file = Path(str(sys.modules[module].__file__))
    source = file.with_name(file.name.replace("configuration_", "modeling_"))
    return source.is_file() and "_is_stateful = True" in source.read_text(encoding="utf-8")
