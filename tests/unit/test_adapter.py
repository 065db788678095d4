"""The adapter's three parts put together are the model's own forward; and the transformers facts that this rests on."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from references import forward_logits
from tide_ray import UserError
from tide_ray.models.adapter import Adapter, KVShape
from tide_ray.models.row_cache import ATTENTION_NAME, RowCache
from tiny_models import TINY_ARCHITECTURES, VOCAB_SIZE, build_tiny_model

IDS = torch.randint(3, VOCAB_SIZE, (20,), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.arange(20)


class OneSequence(RowCache):
    """Attention over the rows of one sequence, in the plainest way; notes what each layer stores and asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.stored: list[tuple[int, torch.Size, torch.Size]] = []
        self.asked: list[dict[str, Any]] = []

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.stored.append((layer_idx, key.shape, value.shape))
        return key, value

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, softcap: float, window: int
    ) -> Tensor:
        self.asked.append({"scale": scale, "softcap": softcap, "window": window})
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        num = query.shape[2]
        hidden = torch.ones(num, num, dtype=torch.bool).triu(1)
        if window:
            hidden |= torch.ones(num, num, dtype=torch.bool).tril(-window)
        return (scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ value).transpose(1, 2)


@torch.inference_mode()
def run(adapter: Adapter, cache: OneSequence | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """State after the last layer, normed state and logits of ``IDS``."""
    cache = OneSequence() if cache is None else cache  # without layers of its own it is false
    hidden, calls = adapter.prologue(IDS, POSITIONS, cache)
    for layer, call in enumerate(calls):
        hidden = adapter.run_layer(layer, hidden, call, cache)
    normed = adapter.final_norm(hidden)
    return hidden[0], normed[0], adapter.head(normed)


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_prologue_layers_and_epilogue_are_the_models_forward(architecture: str) -> None:
    model = build_tiny_model(architecture)
    expected = forward_logits(model, IDS.tolist())
    adapter, cache = Adapter(model), OneSequence()
    _, _, logits = run(adapter, cache)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)
    assert [layer for layer, _, _ in cache.stored] == list(range(adapter.num_layers))
    for (_, key, value), shape in zip(cache.stored, adapter.kv_shapes, strict=True):
        assert key == value == (1, shape.num_heads, 20, shape.head_dim)


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_the_prologue_is_the_state_before_layer_0_and_calls_every_layer_once(architecture: str) -> None:
    model = build_tiny_model(architecture)
    with torch.inference_mode():
        expected = model(input_ids=IDS[None], output_hidden_states=True, use_cache=False).hidden_states[0]
    adapter = Adapter(model)
    ran: list[int] = []
    for layer in adapter.layers:
        layer.register_forward_hook(lambda *_: ran.append(1))
    with torch.inference_mode():
        hidden, calls = adapter.prologue(IDS, POSITIONS, OneSequence())
    assert not ran, "the prologue must not run layers"
    assert len(calls) == adapter.num_layers == model.config.num_hidden_layers
    torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "opt", "gpt_neox", "granite"])
def test_hidden_states_of_transformers_end_with_the_normed_state_and_ours_does_not(architecture: str) -> None:
    """``hidden_states[-1]`` is *after* the final norm: the state that leaves the last layer is in none of them."""
    model = build_tiny_model(architecture)
    with torch.inference_mode():
        output = model(input_ids=IDS[None], output_hidden_states=True, use_cache=False)
    adapter = Adapter(model)
    pre_norm, normed, _ = run(adapter)
    assert len(output.hidden_states) == adapter.num_layers + 1
    torch.testing.assert_close(normed, output.hidden_states[-1][0], atol=1e-4, rtol=1e-4)
    assert (pre_norm - output.hidden_states[-1][0]).norm() > 0.1 * pre_norm.norm()
    torch.testing.assert_close(adapter.final_norm(pre_norm), normed, atol=1e-5, rtol=1e-5)


def test_llamas_head_takes_the_normed_state() -> None:
    model = build_tiny_model("llama")
    captured: list[Tensor] = []
    handle = model.model.layers[-1].register_forward_hook(
        lambda _module, _args, output: captured.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.inference_mode():
        output = model(input_ids=IDS[None], output_hidden_states=True, use_cache=False)
        handle.remove()
        torch.testing.assert_close(model.model.norm(captured[0]), output.hidden_states[-1])
        torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)


def test_the_head_keeps_the_models_own_scale_and_soft_cap() -> None:
    for architecture, bound in (("gemma2", 0.5), ("granite", None)):
        model = build_tiny_model(architecture)
        expected = forward_logits(model, IDS.tolist())
        adapter = Adapter(model)
        _, normed, logits = run(adapter)
        plain = model.get_output_embeddings()(normed)
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)
        assert not torch.allclose(logits, plain, atol=1e-2)
        if bound is not None:
            assert logits.abs().max() <= bound


# ---- per-layer differences come from the model ----


def test_gemma3_layers_are_called_with_their_own_rotary_tables_and_windows() -> None:
    adapter, cache = Adapter(build_tiny_model("gemma3_text")), OneSequence()
    with torch.inference_mode():
        _, calls = adapter.prologue(IDS, POSITIONS, cache)
    run(adapter, cache)
    is_local = [kind == "sliding_attention" for kind in adapter.config.layer_types]
    assert is_local == [True, True, False, True, True, False]
    assert [asked["window"] for asked in cache.asked] == [8 if local else 0 for local in is_local]
    tables = [call.kwargs["position_embeddings"][0] for call in calls]
    for (one, one_local), (two, two_local) in pairwise(zip(tables, is_local, strict=True)):
        assert torch.equal(one, two) == (one_local == two_local)


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("llama", {"scale": 0.25, "softcap": 0.0, "window": 0}),
        ("mistral", {"scale": 0.25, "softcap": 0.0, "window": 8}),
        ("gemma2", {"scale": 24**-0.5, "softcap": 5.0, "window": 8}),
        ("granite", {"scale": 0.15, "softcap": 0.0, "window": 0}),
    ],
)
def test_attention_is_asked_for_with_the_models_scale_soft_cap_and_window(
    architecture: str, expected: dict[str, float]
) -> None:
    cache = OneSequence()
    run(Adapter(build_tiny_model(architecture)), cache)
    assert cache.asked[0] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [("llama", KVShape(2, 16)), ("gpt2", KVShape(4, 16)), ("falcon", KVShape(1, 16)), ("qwen3", KVShape(2, 16))],
)
def test_kv_shapes_are_what_the_model_stores(architecture: str, shape: KVShape) -> None:
    adapter = Adapter(build_tiny_model(architecture))
    assert adapter.kv_shapes == [shape] * adapter.num_layers


# ---- one process, several models ----


def test_two_adapters_do_not_disturb_each_other() -> None:
    names = ("llama", "gemma3_text", "falcon")
    expected = [forward_logits(build_tiny_model(name), IDS.tolist()) for name in names]
    adapters = [Adapter(build_tiny_model(name)) for name in names]
    for _ in range(2):
        for adapter, logits in zip(adapters, expected, strict=True):
            torch.testing.assert_close(run(adapter)[2], logits, atol=2e-4, rtol=2e-4)


def test_an_untouched_model_of_the_same_class_still_runs_natively() -> None:
    expected = forward_logits(build_tiny_model("llama"), IDS.tolist())
    adapter = Adapter(build_tiny_model("llama"))
    run(adapter)
    torch.testing.assert_close(forward_logits(build_tiny_model("llama"), IDS.tolist()), expected)


def test_native_attention_is_the_model_as_it_was_and_ours_comes_back_after_an_error() -> None:
    model = build_tiny_model("llama")
    expected = forward_logits(model, IDS.tolist())
    adapter = Adapter(model)
    with adapter.native_attention():
        torch.testing.assert_close(forward_logits(model, IDS.tolist()), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(RuntimeError), adapter.native_attention():
        raise RuntimeError
    assert model.config._attn_implementation == ATTENTION_NAME
    torch.testing.assert_close(run(adapter)[2], expected, atol=2e-4, rtol=2e-4)


def test_a_second_adapter_of_the_same_model_works() -> None:
    """It once probed the model through the attention that the first one had put in."""
    model = build_tiny_model("llama")
    expected = forward_logits(model, IDS.tolist())
    adapters = [Adapter(model), Adapter(model)]
    for adapter in adapters:
        torch.testing.assert_close(run(adapter)[2], expected, atol=2e-4, rtol=2e-4)


def test_making_an_adapter_copies_no_weights_and_leaves_the_modules_in_place() -> None:
    model = build_tiny_model("llama")
    before = {name: id(module) for name, module in model.named_modules()}
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    adapter = Adapter(model)
    run(adapter)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == pointers
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ---- models that cannot be driven ----


def build(model_type: str, **values: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(model_type, vocab_size=64, hidden_size=32, num_hidden_layers=2, **values)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def test_a_state_space_model_is_refused() -> None:
    model = build("mamba", state_size=4, intermediate_size=64)
    with pytest.raises(UserError, match="MambaForCausalLM keeps no key/value cache for each layer"):
        Adapter(model)


def test_multi_head_latent_attention_is_refused() -> None:
    """Keys and values of unlike width do not fit pages."""
    model = build(
        "deepseek_v3",
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=64,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=1,
    )
    with pytest.raises(UserError, match="cache with unlike keys and values"):
        Adapter(model)


def test_a_model_without_its_layers_in_one_list_is_refused() -> None:
    model = build_tiny_model("llama")
    model.model.layers = nn.ModuleList(list(model.model.layers)[:3])
    with pytest.raises(UserError, match="LlamaForCausalLM has no list of 4 decoder layers"):
        Adapter(model)


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
def test_layers_are_called_for_some_rows_as_for_all_of_them(architecture: str) -> None:
    """What goes on behind a boundary reuses the launch's calls, if the model does not look at the launch as a whole."""
    assert Adapter(build_tiny_model(architecture)).calls_are_by_row


def test_calls_that_depend_on_the_whole_launch_are_not_reused() -> None:
    model = build_tiny_model("llama")

    def scale_by_number_of_rows(_module: nn.Module, args: Any, output: Any) -> Any:
        return output[0] * args[0].shape[1], output[1]

    model.model.rotary_emb.register_forward_hook(scale_by_number_of_rows)
    assert not Adapter(model).calls_are_by_row
