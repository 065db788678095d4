"""Layers that run fused: which they are, that they compute the same, and what happens when kernels fail."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from references import GREEDY, loaded, ragged_prompts
from tide_kernels.decoder_layer import decode_layers
from tide_ray import EngineConfig, TideEngine
from tide_ray.engine.kv_cache import KVCache
from tide_ray.engine.rows import LaunchCache, RowSpan, build_rows
from tide_ray.models import fused_layer, fused_norm, layer_fusion, packed_linear
from tide_ray.models.adapter import Adapter
from tide_ray.models.fused_layer import LinearPart
from tide_ray.models.layer_fusion import fuse_layers, use_decode_kernel
from tide_ray.models.packed_linear import can_pack, pack_linears
from tiny_models import VOCAB_SIZE, build_tiny_model

PAGE_SIZE = 8
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 128,
}
needs_bfloat16 = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.bfloat16), reason="this CPU has no products in bfloat16"
)


def wide_model(arch: str) -> PreTrainedModel:
    """A model in bfloat16 whose widths the kernel for decode rows takes."""
    window = {"sliding_window": 9} if arch == "mistral" else {}
    config = AutoConfig.for_model(arch, **WIDE, **window)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            noise = torch.randn_like(parameter) * 0.1
            parameter.data = parameter.data + noise if parameter.ndim == 1 else noise
    return model.to(torch.bfloat16).eval().requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("arch", "is_llamas"),
    [
        ("llama", True), ("mistral", True), ("qwen2", True), ("qwen3", True),
        ("gemma2", False), ("phi3", False), ("gpt2", False), ("granite", False), ("mixtral", False),
    ],
)  # fmt: skip
def test_layers_that_compute_as_llamas_are_fused_and_no_others(arch: str, is_llamas: bool, dtype: torch.dtype) -> None:
    adapter = Adapter(build_tiny_model(arch).to(dtype))
    assert len(fuse_layers(adapter)) == (adapter.num_layers if is_llamas else 0)


@pytest.mark.parametrize("change", ["activation", "scaled residual", "norm"])
def test_a_layer_with_llamas_parts_that_computes_otherwise_keeps_its_code(change: str) -> None:
    model = build_tiny_model("llama")
    layer: Any = model.model.layers[1]
    if change == "activation":
        layer.mlp.act_fn = nn.GELU()
    elif change == "scaled residual":
        own = layer.mlp.forward
        layer.mlp.forward = lambda rows: own(rows) * 1.05
    else:
        layer.input_layernorm.forward = lambda rows: rows
    assert sorted(fuse_layers(Adapter(model))) == [0, 2, 3]


def test_a_layer_that_scales_queries_by_far_positions_keeps_its_code() -> None:
    """Ministral 3 has LLaMA's parts, and computes as LLaMA at the near positions of any probe."""
    model = build_tiny_model("llama")
    model.config.rope_parameters["llama_4_scaling_beta"] = 0.1
    assert not fuse_layers(Adapter(model))


def test_the_models_own_forward_reads_the_fused_weights() -> None:
    model = build_tiny_model("qwen3")
    ids = torch.arange(3, 12)[None]
    expected = model(ids).logits
    fused = fuse_layers(Adapter(model))
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    attention: Any = model.model.layers[0].self_attn
    assert isinstance(attention.q_proj, LinearPart)
    assert attention.q_proj.owner is fused[0]
    assert not [name for name, _ in model.named_parameters() if "_proj" in name], "the weights lie in one place only"


def test_a_second_engine_finds_the_fused_layers_of_the_first() -> None:
    model = loaded(build_tiny_model("llama"))
    config = EngineConfig(dtype="float32", max_model_len=96, max_num_seqs=2)
    prompts = ragged_prompts(3, VOCAB_SIZE)
    engines = [TideEngine(model, config) for _ in range(2)]
    first, second = (engine.runner.adapter.fused_layers for engine in engines)
    assert first == second
    answers = [[out.outputs[0].token_ids for out in engine.generate(prompts, GREEDY)] for engine in engines]
    assert answers[0] == answers[1]


def test_off_runs_the_models_own_layers_and_the_answers_stay() -> None:
    prompts, answers = ragged_prompts(5, VOCAB_SIZE), {}
    for compiled in ("auto", "off"):
        config = EngineConfig(dtype="float32", max_model_len=96, max_num_seqs=4, compile=compiled)
        engine = TideEngine(loaded(build_tiny_model("qwen3")), config)
        assert bool(engine.runner.adapter.fused_layers) == (compiled == "auto")
        answers[compiled] = [out.outputs[0].token_ids for out in engine.generate(prompts, GREEDY)]
    assert answers["auto"] == answers["off"]


def use_kernels(adapter: Adapter, window: int | None = None) -> None:
    """Let all layers run in the kernel for decode rows; ``window``: that of layer 1, if not its own."""
    fused = fuse_layers(adapter)
    for layer in fused.values():
        pack_linears(layer)
    if window is not None:
        fused[1].attention = replace(fused[1].attention, window=window)
    use_decode_kernel(fused, PAGE_SIZE)
    adapter.fused_layers.update(fused)


def run_layer(adapter: Adapter, states: Tensor, lengths: list[int], *, num_decode: int, by_row: bool = True) -> Tensor:
    """Layer 1 over sequences of ``lengths``: their states are prefilled, but the last of the first ``num_decode``."""
    pools = KVCache(adapter.kv_shapes, num_pages=32, page_size=PAGE_SIZE, dtype=adapter.dtype, device=adapter.device)
    pages = np.arange(32, dtype=np.int32).reshape(len(lengths), -1)
    starts = np.cumsum([0, *lengths])[:-1]
    prefill, decode, prefilled = [], [], []
    for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        count = length - (number < num_decode)
        prefill.append(RowSpan.run([3] * count, 0, pages[number], is_decode=False))
        prefilled += range(start, start + count)
        if number < num_decode:
            decode.append((RowSpan.run([3], length - 1, pages[number], is_decode=True), start + length - 1))
    out = []
    for spans, rows in ((prefill, prefilled), ([span for span, _ in decode], [row for _, row in decode])):
        launch = build_rows(spans, PAGE_SIZE, adapter.device, by_row=by_row)
        cache = LaunchCache(pools, launch)
        _, calls = adapter.prologue(launch.token_ids, launch.positions, cache)
        out.append(adapter.run_layer(1, states[:, rows], calls[1], cache)[0])
    return torch.cat(out)


@needs_bfloat16
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
@torch.inference_mode()
def test_kernels_for_decode_rows_compute_what_the_layer_computes(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases (qwen2), norms of Q and K (qwen3) and windows (mistral) included; prompts and decode rows."""
    adapter = Adapter(wide_model(arch))
    lengths = [5, 17, 2, 24]
    states = torch.randn(1, sum(lengths), 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = run_layer(adapter, states, lengths, num_decode=4, by_row=False)
    use_kernels(adapter)
    called = []
    kernel = fused_layer.decode_layers
    monkeypatch.setattr(fused_layer, "decode_layers", lambda *args: (called.append(args[0].shape[1]), kernel(*args))[1])
    actual = run_layer(adapter, states, lengths, num_decode=4)
    assert called == [44, 4], "prompts' rows, then decode rows"
    torch.testing.assert_close(actual, expected, rtol=0.03, atol=0.03)
    error = (actual - expected).float().norm() / (expected - states[0]).float().norm()
    assert error < 0.01


@needs_bfloat16
@torch.inference_mode()
def test_a_decode_row_is_the_same_to_the_bit_alone_and_among_others() -> None:
    """oneDNN rounds a row by how many there are, so that what was computed depended on who else was resident."""
    adapter = Adapter(wide_model("llama"))
    use_kernels(adapter)
    lengths = [5, 17, 3, 24]
    states = torch.randn(1, sum(lengths), 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    together = run_layer(adapter, states, lengths, num_decode=4)[-4:]
    starts = np.cumsum([0, *lengths])
    for number, length in enumerate(lengths):
        alone = run_layer(adapter, states[:, starts[number] : starts[number + 1]], [length], num_decode=1)[-1]
        assert torch.equal(together[number], alone)


@needs_bfloat16
@pytest.mark.parametrize("order", [[0, 1], [0, 1, 0], [1, 0, 1, 0]])
@torch.inference_mode()
def test_layers_in_one_call_compute_what_they_compute_one_by_one(
    order: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their windows differ (mistral); the last of an even and of an odd number of layers writes what is returned."""
    adapter = Adapter(wide_model("mistral"))
    use_kernels(adapter, window=3)
    states = torch.randn(1, 6, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    launch = build_rows(
        [RowSpan.run([3] * 6, 0, np.arange(4, dtype=np.int32), is_decode=False)], PAGE_SIZE, adapter.device, by_row=True
    )
    outs, pages = [], []
    called: list[int] = []
    kernel = fused_layer.decode_layers
    monkeypatch.setattr(fused_layer, "decode_layers", lambda *args: (called.append(len(args[4])), kernel(*args))[1])
    for together in (False, True):
        pools = KVCache(adapter.kv_shapes, num_pages=4, page_size=PAGE_SIZE, dtype=adapter.dtype, device=adapter.device)
        cache = LaunchCache(pools, launch)
        _, calls = adapter.prologue(launch.token_ids, launch.positions, cache)
        called.clear()
        hidden = states.clone()
        for part in [order] if together else [[layer] for layer in order]:
            hidden = adapter.run_layers(part, hidden, calls, cache)
        assert called == ([len(order)] if together else [1] * len(order))
        outs.append(hidden)
        pages.append(torch.stack([*pools.key_pools, *pools.value_pools]))
    assert torch.equal(*outs)
    assert torch.equal(*pages)


@needs_bfloat16
@torch.inference_mode()
def test_layers_of_two_kinds_do_not_run_in_one_call() -> None:
    adapter = Adapter(wide_model("llama"))
    use_kernels(adapter)
    weights: list[Any] = [layer.decode_weights for layer in adapter.fused_layers.values()]
    weights[1] = replace(weights[1], eps=(1e-3, 1e-3, 0.0, 0.0))
    rows, pools = (
        torch.zeros(1, 1, 128).bfloat16(),
        KVCache(adapter.kv_shapes, num_pages=1, page_size=PAGE_SIZE, dtype=adapter.dtype, device=adapter.device),
    )
    launch = build_rows([RowSpan.run([3], 0, np.zeros(1, np.int32), is_decode=True)], PAGE_SIZE, adapter.device)
    places = LaunchCache(pools, launch).decode_places([0, 1])
    table = torch.ones(1, weights[0].head_dim).bfloat16()
    with pytest.raises(ValueError, match="2 layers with 2 pools do not run in one call"):
        decode_layers(rows, table, table, places, weights)


@pytest.mark.skipif(packed_linear.DECODE_ROWS < 2**16, reason="this CPU leaves launches of many rows to oneDNN")
def test_answers_in_bfloat16_are_the_same_in_any_batch() -> None:
    model = loaded(wide_model("llama"))
    prompts = ragged_prompts(9, VOCAB_SIZE)
    answers = []
    for residents, rows in ((1, 2048), (9, 2048), (4, 7)):
        config = EngineConfig(dtype="bfloat16", max_model_len=96, max_num_seqs=residents, max_num_batched_tokens=rows)
        engine = TideEngine(model, config)
        answers.append([out.outputs[0].token_ids for out in engine.generate(prompts, GREEDY)])
    assert answers[0] == answers[1] == answers[2]


@needs_bfloat16
@pytest.mark.parametrize("broken", ["fused layer", "decode rows", "products"])
def test_kernels_that_fail_leave_the_model_as_it_was_with_a_warning(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("LLVM ERROR: cannot select\nmore of it")

    packed_linear.kernels_work.cache_clear()
    if broken == "fused layer":
        monkeypatch.setattr(fused_norm, "rms_norm", fail)  # the same kernel, which norms outside of layers use
    owner, name = {
        "fused layer": (fused_layer, "rms_norm"),
        "decode rows": (layer_fusion, "decode_layers"),
        "products": (packed_linear, "tiled_linear"),
    }[broken]
    monkeypatch.setattr(owner, name, fail)
    with caplog.at_level(logging.WARNING):
        config = EngineConfig(dtype="bfloat16", max_model_len=96, max_num_seqs=2)
        engine = TideEngine(loaded(wide_model("llama")), config)
    packed_linear.kernels_work.cache_clear()
    warnings = [record.getMessage() for record in caplog.records if "cannot select" in record.getMessage()]
    assert len(warnings) == 1
    assert "more of it" not in warnings[0]
    layers = engine.runner.adapter.fused_layers.values()
    assert len(layers) == engine.describe()["num_fused_layers"] == (0 if broken == "fused layer" else 2)
    assert all(layer.decode_weights is None for layer in layers)
    assert len(engine.generate([[5, 6, 7]], GREEDY)[0].outputs[0].token_ids) == GREEDY.max_tokens
