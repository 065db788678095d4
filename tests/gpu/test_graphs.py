"""Kernels in CUDA graphs, their pace, and the engine with kernels on and off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exit_helpers import forced_engine
from tide_kernels.compact import gather_rows, partition
from tide_kernels.paged_attention import paged_decode_attention
from tide_kernels.rms_norm import add_rms_norm
from tide_kernels.route import GateWeights, Normalisation, route
from tide_kernels.sample import SamplingRules, sample_tokens
from tide_ray import EngineConfig, SamplingParams, TideEngine
from tiny_models import build_tiny_model

HIDDEN, NUM_ROWS = 4096, 128
SHARE_OF_COPIES = 0.5
"""Far below what is aimed at: this guards against a kernel gone wrong, the benchmark measures."""


def captured(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = function()
    return graph, out


def test_a_boundary_runs_from_a_graph_on_new_states() -> None:
    """Route, part and gather, with no word from the host; counters of split products must be zero at each replay."""
    states = torch.randn(8, HIDDEN, device="cuda", dtype=torch.bfloat16)
    shapes = (HIDDEN, 128), (128,), (128,), (3,)
    gate = GateWeights(*(torch.randn(shape, device="cuda") for shape in shapes))
    thresholds, norm = torch.full((8,), 0.5, device="cuda"), Normalisation("rms", 1e-6)

    def boundary() -> tuple[torch.Tensor, ...]:
        scores, exits = route(states, gate, thresholds, norm=norm)
        order, counts = partition(exits)
        return scores, counts, gather_rows(states, order)

    graph, out = captured(boundary)
    for seed in range(3):
        torch.manual_seed(seed)
        states.copy_(torch.randn_like(states))
        graph.replay()
        for actual, expected in zip(out, boundary(), strict=True):
            assert torch.equal(actual, expected)


def test_sampling_and_attention_run_from_graphs() -> None:
    logits = torch.randn(4, 50257, device="cuda")
    ones, numbers = torch.ones(4, device="cuda"), torch.arange(4, device="cuda")
    rules = SamplingRules(ones, (numbers * 0 + 40).int(), ones * 0.9, ones * 0, numbers, numbers)
    graph, tokens = captured(lambda: sample_tokens(logits, rules))
    pages = torch.randn(2, 64, 2, 32, 128, device="cuda").half()
    query, lengths = torch.randn(2, 8, 128, device="cuda").half(), torch.tensor([100, 1000], device="cuda").int()
    table = torch.arange(64, device="cuda").int().view(2, 32)
    attention, out = captured(lambda: paged_decode_attention(query, *pages, table, lengths, scale=0.1))
    logits.copy_(torch.randn_like(logits))
    query.copy_(torch.randn_like(query))
    graph.replay()
    attention.replay()
    assert torch.equal(tokens, sample_tokens(logits, rules))
    assert torch.equal(out, paged_decode_attention(query, *pages, table, lengths, scale=0.1))


def test_a_norm_keeps_pace_with_copies() -> None:
    rows = torch.randn(32, 2, NUM_ROWS * 32, HIDDEN, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16)
    graph, _ = captured(lambda: [add_rms_norm(a, b, weight, 1e-5) for a, b in rows])
    copies, _ = captured(lambda: [pair.clone() for pair in rows])

    def seconds(work: torch.cuda.CUDAGraph) -> float:
        times = []
        for _ in range(5):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work.replay()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        return min(times)

    assert seconds(copies) / seconds(graph) >= SHARE_OF_COPIES  # both move four rows for each pair


@pytest.mark.parametrize("kv_policy", ["fitted", "deferred"])
def test_tokens_are_the_same_with_kernels_on_and_off(monkeypatch: pytest.MonkeyPatch, kv_policy: str) -> None:
    prompts = [[5, 9, 3, 7, 8], [11, 4], [20, 21, 22]]
    params = [SamplingParams(max_tokens=12, temperature=t, top_k=20, top_p=0.9, seed=3) for t in (0.0, 0.8, 0.0)]
    answers = []
    for kernels in ("torch", "cuda"):
        monkeypatch.setenv("TIDE_KERNELS", kernels)
        model = build_tiny_model("llama").cuda()
        engine = forced_engine(model, [1], [0.5], kv_policy=kv_policy, is_identity=True, device="cuda")
        outputs = [out.outputs[0] for out in engine.generate(prompts, params)]
        answers.append([(out.token_ids, out.exit_layers) for out in outputs])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fused_layers_pass_their_probes_and_the_selfcheck(tiny_llama_folder: Path, dtype: str) -> None:
    config = EngineConfig(dtype=dtype, device="cuda", max_model_len=64, max_num_seqs=2)
    engine = TideEngine.from_pretrained(str(tiny_llama_folder), config)
    assert engine.runner.adapter.fused_layers
    out = engine.generate([[5, 9, 3]], SamplingParams(max_tokens=4, temperature=0))
    assert len(out[0].outputs[0].token_ids) == 4
