"""The engine's steps on a device: from CUDA graphs or not, queued ahead or not, and queued without a wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from exit_helpers import forced_engine
from references import assert_idle, loaded, ragged_prompts
from tide_ray import EngineConfig, SamplingParams, TideEngine
from tide_ray.engine.graphs import StageGraphs
from tiny_models import EOS_ID, VOCAB_SIZE, build_tiny_model

SIZES = {"dtype": "float32", "device": "cuda", "page_size": 16, "max_model_len": 96, "max_num_seqs": 6}
KINDS = ({"temperature": 0.0}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9}, {"temperature": 0.0, "logprobs": 2})


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return ragged_prompts(9, VOCAB_SIZE, longest=20)


@pytest.fixture(scope="module")
def params() -> list[SamplingParams]:
    return [
        SamplingParams(max_tokens=14, seed=n, stop_token_ids=(40, 41, 42) if n % 2 else (), **KINDS[n % 3])
        for n in range(9)
    ]


def make_engine(architecture: str, **changes: Any) -> TideEngine:
    model = loaded(build_tiny_model(architecture).cuda(), eos_token_ids=(EOS_ID,))
    return TideEngine(model, EngineConfig(**{**SIZES, **changes}))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt2", "phi3"])
@pytest.mark.parametrize("changes", [{"async_scheduling": "off"}, {"cuda_graphs": "off"}, {}], ids=str)
def test_answers_do_not_depend_on_graphs_or_on_steps_ahead(
    architecture: str, changes: dict[str, str], prompts: list[list[int]], params: list[SamplingParams]
) -> None:
    plain = make_engine(architecture, cuda_graphs="off", async_scheduling="off")
    engine = make_engine(architecture, **changes)
    expected, actual = (
        [(out.token_ids, out.finish_reason) for output in one.generate(prompts, params) for out in output.outputs]
        for one in (plain, engine)
    )
    assert actual == expected
    assert engine.runs_ahead == ("async_scheduling" not in changes)
    if "cuda_graphs" not in changes:
        assert engine.describe()["cuda_graphs"]["full"] > 0
    assert_idle(engine)


@pytest.mark.parametrize("kv_policy", ["fitted", "copy", "deferred"])
def test_exits_are_the_same_from_graphs(kv_policy: str, prompts: list[list[int]]) -> None:
    params = [SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, seed=n) for n in range(len(prompts))]
    answers = []
    for graphs in ("off", "auto"):
        model = build_tiny_model("llama").cuda()
        engine = forced_engine(
            model, (1, 3), (0.4, 0.5), kv_policy=kv_policy, cuda_graphs=graphs, device="cuda", page_size=16
        )
        outputs = [output.outputs[0] for output in engine.generate(prompts, params)]
        answers.append([(out.token_ids, out.exit_layers) for out in outputs])
    assert answers[0] == answers[1]
    assert {"stage_0", "stage_1", "stage_2"} == set(engine.describe()["cuda_graphs"])


@pytest.mark.parametrize("graphs", ["auto", "off"])
def test_a_step_that_decodes_is_queued_without_waiting(
    graphs: str, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises at whatever makes the host wait for the device."""
    engine = make_engine("llama", cuda_graphs=graphs)
    params = [SamplingParams(max_tokens=8, seed=n, ignore_eos=True, **KINDS[n % 2]) for n in range(len(prompts))]
    expected = [output.outputs[0].token_ids for output in engine.generate(prompts, params)]  # warms up as well
    run, num_watched = engine.runner.run, 0

    def watched(spans: Any, ahead: Any = None) -> Any:
        nonlocal num_watched
        if not all(span.is_decode for span in spans):
            return run(spans, ahead)
        num_watched += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(spans, ahead)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(engine.runner, "run", watched)
    assert [output.outputs[0].token_ids for output in engine.generate(prompts, params)] == expected
    assert num_watched > 4


def test_warming_up_captures_graphs_of_16_bit_layers_as_well() -> None:
    model = build_tiny_model("llama").cuda().bfloat16()
    engine = TideEngine(loaded(model), EngineConfig(**{**SIZES, "dtype": "bfloat16"}))
    engine.warm_up()
    graphs = engine.runner.graphs
    assert isinstance(graphs, StageGraphs)
    assert graphs.num_captured == {"full": len(graphs.sizes)}
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    assert [len(output.outputs[0].token_ids) for output in engine.generate([[5, 9, 3], [7, 8]], params)] == [6, 6]
    assert graphs.num_captured == {"full": len(graphs.sizes)}


def test_a_stage_that_waits_for_the_device_runs_without_graphs(
    prompts: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    """A mixture of experts asks which rows go where; the engine answers all the same, with one warning."""
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    expected, actual = (
        [output.outputs[0].token_ids for output in make_engine("mixtral", cuda_graphs=graphs).generate(prompts, params)]
        for graphs in ("off", "auto")
    )
    assert actual == expected
    assert len([record for record in caplog.records if "runs without CUDA graphs" in record.message]) <= 1
