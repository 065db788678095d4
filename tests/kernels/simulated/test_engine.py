"""The engine answers the same with its kernels on, here in the simulator, and off."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from exit_helpers import forced_engine
from tide_kernels.cuda.kernel import Kernel
from tide_ray import SamplingParams, TideEngine
from tide_ray.engine import exit_setup, rows
from tiny_models import build_tiny_model

PROMPTS = [[5, 9, 3, 7, 8], [11, 4]]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in (
        ("paged_attention", "ATTENTION_WARPS", 1),
        ("lane_attention", "ATTENTION_WARPS", 1),
        ("rms_norm", "NORM_THREADS", 32),
        ("silu_mul", "SILU_THREADS", 64),
        ("sample", "SAMPLE_THREADS", 32),
        ("compact", "MOVE_THREADS", 32),
        ("kv_write", "KV_WARPS", 2),
    ):
        monkeypatch.setattr(f"tide_kernels.cuda.{module}.{name}", value)


def answers(engine: TideEngine, monkeypatch: pytest.MonkeyPatch, kernels: str) -> list[tuple[list[int], list[int]]]:
    monkeypatch.setenv("TIDE_KERNELS", kernels)
    params = [SamplingParams(max_tokens=3, temperature=t, top_k=20, top_p=0.9, seed=3) for t in (0.0, 0.8)]
    outputs = [out.outputs[0] for out in engine.generate(PROMPTS, params)]
    return [(out.token_ids, out.exit_layers) for out in outputs]


@pytest.mark.parametrize("kv_policy", ["fitted", "deferred"])
def test_tokens_and_depths_are_the_same_with_kernels_on_and_off(
    monkeypatch: pytest.MonkeyPatch, kv_policy: str
) -> None:
    """Prompts come in parts, so that all kinds of rows attend: decode rows, whole prompts, and later parts in pages."""
    monkeypatch.setattr(exit_setup, "measure_costs", lambda *_: None)  # the simulator's, which nobody asks for
    options = {"is_identity": True, "selfcheck": False, "prefix_caching": False, "max_num_batched_tokens": 4}
    engine = forced_engine(build_tiny_model("llama"), [1], [0.5], kv_policy=kv_policy, **options)
    assert engine.runner.exits.boundaries[0].gate.kernel_weights is not None
    engine.runner._by_row = False  # as on a GPU, where only decode rows attend row by row
    expected = answers(engine, monkeypatch, "torch")
    assert {depth for _, depths in expected for depth in depths} == {1, 4}
    launched: Counter[str] = Counter()
    launch = Kernel.launch

    def counted(kernel: Kernel, *arguments: Any) -> None:
        launched[kernel.function.__name__] += 1
        launch(kernel, *arguments)

    monkeypatch.setattr(Kernel, "launch", counted)
    in_pages, attend = [], rows.paged_extend_attention
    monkeypatch.setattr(rows, "paged_extend_attention", lambda *a, **k: in_pages.append(1) or attend(*a, **k))
    assert answers(engine, monkeypatch, "cuda") == expected
    assert in_pages
    assert {"sample_rows", "move", "write_heads", "attend"} <= set(launched), launched
    assert launched["attend"] > len(in_pages), "decode rows attend in their kernel, too"


def test_gates_score_in_one_launch_as_they_do_in_torch(generator: torch.Generator) -> None:
    from tide_ray.exits.gates import Gate, PrefillGate

    gate, prefill = Gate(40, 24, num_tokens=8), PrefillGate(40, 24)
    gate.scale.fill_(1.3)
    gate.offset.fill_(-0.2)
    states, normed = torch.randn(2, 5, 40, generator=generator)
    positions, lengths = torch.tensor([0, 3, 5, 7, 8]), torch.full((5,), 9)
    with torch.inference_mode():
        expected = gate.scores(states, normed), prefill.damages(states, positions, lengths)
        gate.use_kernel()
        prefill.use_kernel()
        actual = gate.scores(states, normed), prefill.damages(states, positions, lengths)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=0)
