"""What an engine in bfloat16 on a CPU puts in the place of a model's linear layers and norms."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from references import loaded
from tide_ray import EngineConfig, TideEngine
from tide_ray.models.fused_norm import FusedRMSNorm, fuse_norms
from tide_ray.models.packed_linear import DECODE_ROWS, PackedLinear, can_pack
from tiny_models import build_tiny_model

needs_bfloat16 = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.bfloat16), reason="this CPU has no products in bfloat16"
)


def wide_llama(**changes: int) -> nn.Module:
    """A layer's worth of modules whose widths fit the kernels, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, **changes}
    config = LlamaConfig(vocab_size=128, num_key_value_heads=4, **sizes)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


@needs_bfloat16
@pytest.mark.parametrize("num_rows", [1, DECODE_ROWS, DECODE_ROWS + 1])
@pytest.mark.parametrize("num_outputs", [128, 100])
def test_packed_layers_compute_the_same_with_few_rows_and_with_many(num_outputs: int, num_rows: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, num_outputs).bfloat16()
    rows = torch.randn(1, num_rows, 96).bfloat16()
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(rows), linear(rows), rtol=2**-7, atol=1e-3)


@needs_bfloat16
def test_weights_are_read_where_they_lie_only_in_the_layout_that_is_known() -> None:
    assert PackedLinear(nn.Linear(96, 128).bfloat16()).tiled is not None
    assert PackedLinear(nn.Linear(96, 100).bfloat16()).tiled is None, "oneDNN pads 100 outputs to 128"


@needs_bfloat16
def test_norms_like_llamas_are_fused_and_answers_stay() -> None:
    model = wide_llama()
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        assert fuse_norms(model) == 5
        torch.testing.assert_close(model(ids).logits, expected, rtol=0.05, atol=0.02)
    assert fuse_norms(model) == 0, "what is fused stays as it is"


@needs_bfloat16
def test_gradients_pass_a_fused_norm_because_exit_heads_are_refined_through_it() -> None:
    model = wide_llama()
    states = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    expected = torch.autograd.grad(model.model.norm(states).square().sum(), states)[0]
    assert fuse_norms(model) == 5
    assert isinstance(model.model.norm, FusedRMSNorm)
    actual = torch.autograd.grad(model.model.norm(states).square().sum(), states)[0]
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.02)


@needs_bfloat16
def test_what_is_only_called_a_norm_stays() -> None:
    class PairRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(16).bfloat16()), 1e-5

        def forward(self, rows: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            return rows * gate

    assert fuse_norms(nn.Sequential(PairRMSNorm())) == 0


@needs_bfloat16
def test_norms_that_scale_otherwise_or_do_not_fit_are_left_alone() -> None:
    assert fuse_norms(build_tiny_model("gemma2").to(torch.bfloat16)) == 0, "gemma's weight is one less than its factor"
    assert fuse_norms(wide_llama(hidden_size=40, num_attention_heads=4)) == 0, "vectors hold 16 numbers"
    assert fuse_norms(wide_llama().float()) == 0, "float32 computes as HuggingFace does"


@needs_bfloat16
def test_an_engine_in_bfloat16_runs_them() -> None:
    model = wide_llama()
    engine = TideEngine(loaded(model), EngineConfig(dtype="bfloat16", max_model_len=32, max_num_seqs=2))
    kinds = [
        type(module) for part in (model, *engine.runner.adapter.fused_layers.values()) for module in part.modules()
    ]
    assert kinds.count(FusedRMSNorm) == 5
    assert kinds.count(PackedLinear) == 1 + 2 * 4, "the head, and of each layer QKV, output, gate and up, down"
    output = engine.generate([[1, 2, 3]])[0]
    assert output.error == ""
    assert len(output.outputs[0].token_ids) == 16
