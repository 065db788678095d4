"""The self-check at load: it passes every listed architecture and names what differs in a model it must refuse.

The refused models are ones whose parts do something that packed rows cannot give them: look at a neighbouring row,
count rows instead of positions, or reduce over the sequence. Alone and unpacked they are consistent models.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaRMSNorm,
)

from references import loaded
from tide_ray import EngineConfig, TideEngine, UserError
from tide_ray.engine.selfcheck import selfcheck
from tide_ray.models.adapter import Adapter
from tiny_models import MAX_POSITIONS, TINY_ARCHITECTURES, build_tiny_model

CONFIG = EngineConfig(page_size=4, max_model_len=32, max_num_seqs=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_every_listed_architecture_passes(architecture: str, dtype: torch.dtype) -> None:
    selfcheck(Adapter(build_tiny_model(architecture).to(dtype)))


def tiny_phimoe(window: int | None) -> PreTrainedModel:
    config = AutoConfig.for_model(
        "phimoe", vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, max_position_embeddings=128, sliding_window=window,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_a_window_that_only_the_mask_has_limits_the_context() -> None:
    """Packed rows have no mask: PhiMoE's tokens saw all before them, and the check's prompts are shorter than that."""
    engine = TideEngine(loaded(tiny_phimoe(window=32)), EngineConfig(max_num_seqs=2))
    assert engine.max_model_len == 32
    with pytest.raises(UserError, match="max_model_len"):
        TideEngine(loaded(tiny_phimoe(window=32)), EngineConfig(max_num_seqs=2, max_model_len=64))
    assert TideEngine(loaded(tiny_phimoe(window=None)), EngineConfig(max_num_seqs=2)).max_model_len == 128
    mistral = TideEngine(loaded(build_tiny_model("mistral")), EngineConfig(max_num_seqs=2))
    assert mistral.max_model_len == MAX_POSITIONS, "its attention is asked for the window"


@pytest.mark.parametrize("seed", range(8))
def test_experts_chosen_by_rounding_are_no_reason_to_refuse(seed: int) -> None:
    """In bfloat16 two experts' scores may tie: the model then differs from itself in a few rows, and was refused."""
    selfcheck(Adapter(build_tiny_model("mixtral", seed).to(torch.bfloat16)))


# ---- models that differ ----


class TokenShiftLayer(LlamaDecoderLayer):
    """Mixes in the row before, as RWKV-like layers do."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shifted = torch.cat([torch.zeros_like(hidden_states[:, :1]), hidden_states[:, :-1]], dim=1)
        return super().forward(hidden_states + 0.5 * shifted, *args, **kwargs)


class CountingLayer(LlamaDecoderLayer):
    """Scales each row by its index, taking that for its position."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        index = torch.arange(hidden_states.shape[1], dtype=hidden_states.dtype)
        return super().forward(hidden_states * (1 + 0.1 * index[None, :, None]), *args, **kwargs)


class OwnAttentionLayer(LlamaDecoderLayer):
    """Attends by itself (to all rows before, equally), besides the model's attention."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = super().forward(hidden_states, *args, **kwargs)
        return out + nn.functional.scaled_dot_product_attention(out, out, out, is_causal=True, scale=0.0)


class CentringNorm(LlamaRMSNorm):
    """Takes the running mean over the sequence away."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        count = torch.arange(1, hidden_states.shape[1] + 1)[None, :, None]
        return super().forward(hidden_states - hidden_states.cumsum(dim=1) / count)


class CountingEmbeddingsModel(LlamaModel):
    """Embeds positions by counting rows."""

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        embedded = self.embed_tokens(input_ids)
        count = torch.arange(embedded.shape[1], dtype=embedded.dtype)[None, :, None]
        return super().forward(**{**kwargs, "inputs_embeds": embedded * (1 + 0.1 * count)})


class ShiftingModel(LlamaModel):
    """Does something between its last layer and its norm that is no module's work."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        **kwargs: Any,
    ) -> Any:
        hidden, cache = self.embed_tokens(input_ids), past_key_values
        if cache is None and use_cache:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=cache,
            position_ids=position_ids,
        )
        rotary = self.rotary_emb(hidden, position_ids=position_ids)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, past_key_values=cache, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden + 3.0), past_key_values=cache)


class CountingHead(LlamaForCausalLM):
    """Scales logits by the row's index."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * (1 + torch.arange(output.logits.shape[1])[None, :, None])
        return output


class DoublingModel(LlamaModel):
    """Changes the normed states before it returns them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 2
        return output


def changed_llama(part: str, new_class: type[nn.Module]) -> PreTrainedModel:
    model = build_tiny_model("llama")
    (model.get_submodule(part) if part else model).__class__ = new_class
    return model


@pytest.mark.parametrize(
    ("part", "new_class", "named"),
    [
        ("model.layers.2", TokenShiftLayer, "the layer 2 in"),
        ("model.layers.0", CountingLayer, "the layer 0 in"),
        ("model.layers.3", OwnAttentionLayer, "the layer 3 in"),
        ("model.norm", CentringNorm, "the final norm in"),
        ("model", CountingEmbeddingsModel, "the embedding or positions in"),
        ("", CountingHead, "the head in"),
    ],
)
def test_a_model_that_packed_rows_change_is_refused_by_the_part_that_differs(
    part: str, new_class: type[nn.Module], named: str
) -> None:
    model = changed_llama(part, new_class)
    kind = type(model).__name__
    with pytest.raises(UserError) as caught:
        TideEngine(loaded(model), CONFIG)
    message = str(caught.value)
    assert message.startswith(f"model: {kind} differs from its own forward at {named}")
    assert "\n" not in message


def test_code_between_the_last_layer_and_the_norm_is_refused() -> None:
    model = changed_llama("model", ShiftingModel)
    with pytest.raises(UserError, match=r"^model: LlamaForCausalLM differs from its own forward at the "):
        TideEngine(loaded(model), CONFIG)


def test_code_after_the_norm_is_refused() -> None:
    with pytest.raises(UserError, match="LlamaForCausalLM does more after its last layer than apply norm"):
        TideEngine(loaded(changed_llama("model", DoublingModel)), CONFIG)


def test_the_self_check_can_be_turned_off() -> None:
    config = EngineConfig(page_size=4, max_model_len=32, max_num_seqs=2, selfcheck=False)
    engine = TideEngine(loaded(changed_llama("", CountingHead)), config)
    assert engine.generate([[5, 6]])[0].error == ""


def test_the_self_check_leaves_no_hook_and_the_engines_attention_behind() -> None:
    model = build_tiny_model("llama")
    adapter = Adapter(model)
    selfcheck(adapter)
    assert model.config._attn_implementation == "tide_ray"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in adapter.layers)


# ---- architectures that cannot run ----

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}


def build(model_type: str, **values: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, **{**SMALL, **values})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("bloom", {"n_head": 4}),
        ("falcon", {"num_attention_heads": 4, "alibi": True}),
        ("mamba", {"state_size": 4, "intermediate_size": 64}),
        (
            "gpt_oss",
            {
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "num_local_experts": 2,
                "num_experts_per_tok": 1,
            },
        ),
    ],
)
def test_an_architecture_that_cannot_run_is_refused_even_when_not_loaded_by_name(
    model_type: str, values: dict[str, Any]
) -> None:
    """``load`` refuses most of them from their configuration; a model in memory must not slip past."""
    model = build(model_type, **values)
    with pytest.raises(UserError, match=r"^model: "):
        TideEngine(loaded(model), CONFIG)
