"""Tiny random causal language models, one per architecture, and a byte-level tokenizer for them.

Weights are scaled up and norms and biases perturbed, so that greedy outputs vary with the prompt and are decided by
margins far above float32 noise. Everything is float32, in eval mode, and a function of the seed alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
VOCAB_SIZE = 256
TOKENIZER_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
MAX_POSITIONS = 256
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": False,
}
_GQA = {**_COMMON, "num_key_value_heads": 2}
_HEAD_DIM = {**_GQA, "head_dim": 16}
_PARTIAL_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_LAYER_KINDS = ("sliding_attention", "sliding_attention", "full_attention")

_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _HEAD_DIM,
    "mistral": {**_HEAD_DIM, "sliding_window": 8},
    "qwen2": _GQA,
    "qwen3": {**_HEAD_DIM, "tie_word_embeddings": True},
    "gemma2": {
        **_HEAD_DIM,
        "sliding_window": 8,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 0.5,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        **_HEAD_DIM,
        "num_hidden_layers": 6,
        "layer_types": [*_LAYER_KINDS, *_LAYER_KINDS],
        "sliding_window": 8,
        "query_pre_attn_scalar": 24,
        "tie_word_embeddings": True,
    },
    "phi3": {**_GQA, "original_max_position_embeddings": MAX_POSITIONS, "rope_parameters": _PARTIAL_ROTARY},
    "gpt2": {"n_embd": 64, "n_layer": 5, "n_head": 4, "n_positions": MAX_POSITIONS},
    "gpt_neox": {**_COMMON, "rope_parameters": _PARTIAL_ROTARY},
    "falcon": {
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
        "multi_query": True,
        "bias": True,
    },
    "opt": {
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_POSITIONS,
    },
    "olmo2": _GQA,
    "granite": {
        **_GQA,
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.5,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.15,
    },
    "mixtral": {**_HEAD_DIM, "num_local_experts": 4, "num_experts_per_tok": 2},
}

TINY_ARCHITECTURES: tuple[str, ...] = tuple(_CONFIGS)


def build_tiny_model(arch: str, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> PreTrainedModel:
    """The tiny model of ``arch`` (one of TINY_ARCHITECTURES) with the weights of ``seed``."""
    config = AutoConfig.for_model(
        arch, vocab_size=vocab_size, pad_token_id=PAD_ID, bos_token_id=BOS_ID, eos_token_id=EOS_ID, **_CONFIGS[arch]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter) * 0.2
                # Norm weights start at 1 (or 0 for Gemma's 1 + w), biases at 0: those are moved, matrices replaced.
                parameter.copy_(parameter + noise if parameter.ndim == 1 else noise)
            if config.tie_word_embeddings:
                # Else the last token's own embedding wins every time and the model only repeats it.
                model.get_input_embeddings().weight.mul_(0.2)
    return model.eval().requires_grad_(False)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte after the special tokens, so that characters split across tokens; a chat template."""
    symbols = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def save_tiny_model(arch: str, folder: Path, *, seed: int = 0, with_tokenizer: bool = False) -> Path:
    """Save the tiny model in ``folder`` as safetensors; with a tokenizer its vocabulary is TOKENIZER_VOCAB_SIZE."""
    model = build_tiny_model(arch, seed, TOKENIZER_VOCAB_SIZE if with_tokenizer else VOCAB_SIZE)
    model.save_pretrained(folder)
    if with_tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def save_shallow_model(folder: Path) -> Path:
    """Save a LLaMA with a tokenizer whose layers past the second do little, so that there is something to skip."""
    model = build_tiny_model("llama", vocab_size=TOKENIZER_VOCAB_SIZE)
    with torch.no_grad():
        for layer in list(model.model.layers)[2:]:
            layer.self_attn.o_proj.weight.mul_(0.02)
            layer.mlp.down_proj.weight.mul_(0.02)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
