"""Decoding from graphs, on a CPU: what was captured runs again on the same tensors, as a replay on a GPU would."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from exit_helpers import forced_engine
from references import GREEDY, assert_idle, loaded, ragged_prompts, tokens
from tide_ray import EngineConfig, SamplingParams, TideEngine
from tide_ray.engine import memory, preparation
from tide_ray.engine.graphs import StageGraphs, graph_sizes
from tide_ray.engine.kv_cache import page_bytes
from tide_ray.models.adapter import Adapter
from tiny_models import TINY_ARCHITECTURES, VOCAB_SIZE, build_tiny_model

SIZES = {"dtype": "float32", "device": "cpu", "page_size": 4, "max_model_len": 96, "max_num_seqs": 5}


class Rerun:
    """A capture whose replay does the work again. Work is done once before, as on a GPU, where it compiles kernels."""

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0
        self.before_replay: Callable[[], None] = lambda: None

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.num_captured += 1
        work()

        def replay() -> None:
            self.num_replayed += 1
            self.before_replay()
            work()

        return replay


@pytest.fixture
def rerun(monkeypatch: pytest.MonkeyPatch) -> Rerun:
    capture = Rerun()
    monkeypatch.setattr(preparation, "capture_for", lambda _adapter: capture)
    return capture


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return ragged_prompts(9, VOCAB_SIZE, longest=20)


def graphs_of(engine: TideEngine) -> StageGraphs:
    assert engine.runner.graphs is not None
    return engine.runner.graphs


def make_engine(model: Any, **changes: Any) -> TideEngine:
    return TideEngine(loaded(model), EngineConfig(**{**SIZES, **changes}))


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, [1]),
        (6, [1, 2, 4, 6]),
        (70, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 70]),
        (200, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 200]),
    ],
)
def test_sizes_are_few_and_end_with_the_most_rows(most: int, sizes: list[int]) -> None:
    assert graph_sizes(most) == sizes


def test_padding_stays_below_a_fifth_and_graphs_have_an_upper_size() -> None:
    sizes = graph_sizes(5000)
    assert sizes[-1] == 512
    assert len(sizes) < 30
    assert all((b - a - 1) / b < 0.2 for a, b in itertools.pairwise(sizes) if a >= 32)


@pytest.mark.parametrize("architecture", TINY_ARCHITECTURES)
@pytest.mark.parametrize("compiled", ["auto", "off"])
def test_answers_are_the_same_with_graphs(
    rerun: Rerun, prompts: list[list[int]], architecture: str, compiled: str
) -> None:
    model = build_tiny_model(architecture)
    without = make_engine(model, compile=compiled, cuda_graphs="off")
    assert without.runner.graphs is None
    expected = tokens(without.generate(prompts, GREEDY))
    engine = make_engine(model, compile=compiled)
    assert tokens(engine.generate(prompts, GREEDY)) == expected
    assert rerun.num_replayed > 10
    assert engine.describe()["cuda_graphs"] == {"full": rerun.num_captured}
    assert engine.stats.rows_through_layer == without.stats.rows_through_layer
    assert_idle(engine)


@pytest.mark.parametrize("kv_policy", ["fitted", "copy", "deferred"])
@pytest.mark.parametrize("options", [{}, {"holds": (3, 2)}, {"max_num_batched_tokens": 7}], ids=str)
def test_exits_are_the_same_with_graphs(
    rerun: Rerun, prompts: list[list[int]], kv_policy: str, options: dict[str, Any]
) -> None:
    """Survivors of a stage go through the next one's graph; whoever stops has K/V filled with the graph's tables."""
    params = [SamplingParams(temperature=0, max_tokens=14, ignore_eos=True, seed=n) for n in range(len(prompts))]
    answers = []
    for graphs in ("off", "auto"):
        engine = forced_engine(
            build_tiny_model("llama"), (1, 3), (0.4, 0.5), kv_policy=kv_policy, cuda_graphs=graphs, **options
        )
        outputs = [output.outputs[0] for output in engine.generate(prompts, params)]
        answers.append([(out.token_ids, out.exit_layers) for out in outputs])
        assert_idle(engine)
    assert answers[1] == answers[0]
    assert {depth for _, depths in answers[0] for depth in depths} == {1, 3, 4}
    assert set(graphs_of(engine).num_captured) == {"stage_0", "stage_1", "stage_2"}
    assert all(graphs_of(engine).num_captured.values())


def test_prefill_exits_and_states_that_are_only_selected_work_with_graphs(
    rerun: Rerun, prompts: list[list[int]]
) -> None:
    params = [SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, seed=n) for n in range(len(prompts))]
    for options in ({"prefill_thresholds": [0.4, 0.6]}, {"kv_policy": "full"}):
        answers = [
            tokens(
                forced_engine(
                    build_tiny_model("llama"), (1, 3), (0.3, 0.3), prefill_tail=2, cuda_graphs=graphs, **options
                ).generate(prompts, params)
            )
            for graphs in ("off", "auto")
        ]
        assert answers[0] == answers[1]
    assert rerun.num_replayed > 10


def test_padding_writes_to_the_spare_page_alone_and_is_never_read(rerun: Rerun, prompts: list[list[int]]) -> None:
    """Rows, states and K/V that nobody may read are made NaN before each replay: one that is read would spread."""
    model = build_tiny_model("llama")
    params = [SamplingParams(temperature=0, max_tokens=5 + 3 * n, ignore_eos=True) for n in range(len(prompts))]
    expected = tokens(make_engine(model, cuda_graphs="off").generate(prompts, params))
    engine = make_engine(model)
    graphs, pools = graphs_of(engine), engine.runner.pools
    spare = engine.num_kv_pages
    assert pools.num_pages == spare + 1
    padded = []

    def poison() -> None:
        for pool in (*pools.key_pools, *pools.value_pools):
            pool[spare] = torch.nan
        graphs._states.fill_(torch.nan)
        live = graphs._num_filled
        rows = graphs._rows
        assert (rows.write_pages[:live] < spare).all()
        for tensor, padding in zip(rows.tensors, graphs._padding, strict=True):
            assert torch.equal(tensor[live:], padding[live:])
        padded.append(len(rows.token_ids) - live)

    rerun.before_replay = poison
    assert tokens(engine.generate(prompts, params)) == expected
    assert set(padded) == {0, 1, 2, 3, 4}


def test_preemption_and_shared_pages_work_with_graphs(rerun: Rerun, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_tiny_model("llama")
    prefix = list(range(3, 11))
    prompts = [[*prefix, 40 + n, 50 + n] for n in range(8)]
    params = [SamplingParams(max_tokens=16, ignore_eos=True, seed=n, temperature=1.0) for n in range(8)]
    expected = tokens(make_engine(model, cuda_graphs="off").generate(prompts, params))
    adapter = Adapter(model)
    per_page = page_bytes(adapter.kv_shapes, 4, adapter.dtype)
    monkeypatch.setattr(memory, "free_memory", lambda _device: 14 * per_page)
    engine = make_engine(model, kv_memory_fraction=1.0, max_model_len=32)
    assert tokens(engine.generate(prompts, params)) == expected
    assert engine.stats.num_preemptions > 0
    assert engine.stats.num_cached_tokens > 0
    assert rerun.num_replayed > 0
    assert_idle(engine)


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("kv_policy", ["fitted", "deferred"])
def test_a_stage_that_cannot_be_captured_runs_without_graphs(
    rerun: Rerun,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failing: int,
    kv_policy: str,
) -> None:
    """The other stages keep theirs: states and calls pass from graphs to layers that run by themselves, and back."""
    params = [SamplingParams(temperature=0, max_tokens=14, ignore_eos=True, seed=n) for n in range(len(prompts))]

    def engine_with(graphs: str) -> TideEngine:
        return forced_engine(
            build_tiny_model("llama"), (1, 3), (0.4, 0.5), kv_policy=kv_policy, cuda_graphs=graphs, max_num_seqs=6
        )

    expected = tokens(engine_with("off").generate(prompts, params))
    engine = engine_with("auto")
    graphs = graphs_of(engine)
    graphs._graphs.clear()
    captured = graphs._captured

    def fails(index: int, size: int) -> Any:
        graph = captured(index, size)
        if index == failing:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return graph

    monkeypatch.setattr(graphs, "_captured", fails)
    with caplog.at_level(logging.WARNING, logger="tide_ray"):
        assert tokens(engine.generate(prompts, params)) == expected
    name = f"stage_{failing}"
    assert [record.message for record in caplog.records] == [
        f"{name} runs without CUDA graphs: operation not permitted when stream is capturing"
    ]
    assert set(graphs.num_captured) == {"stage_0", "stage_1", "stage_2"} - {name}
    assert_idle(engine)


def test_warming_up_captures_every_size_from_the_largest_on(rerun: Rerun, prompts: list[list[int]]) -> None:
    engine = make_engine(build_tiny_model("llama"))
    sizes: list[int] = []
    run_layer = engine.runner.adapter.run_layer

    def noted(index: int, hidden: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.extend([hidden.shape[1]] if index == 0 else [])
        return run_layer(index, hidden, *rest)

    engine.runner.adapter.run_layer = noted  # type: ignore[method-assign]
    graphs_of(engine).capture_all()
    assert sizes == [5, 4, 2, 1]
    engine.warm_up()
    engine.generate(prompts, GREEDY)
    assert engine.describe()["cuda_graphs"] == {"full": 4}
    assert rerun.num_captured == 4


def test_a_cpu_has_no_graphs() -> None:
    engine = make_engine(build_tiny_model("llama"))
    assert engine.runner.graphs is None
    assert engine.describe()["cuda_graphs"] is None
    assert engine.runner.pools.num_pages == engine.num_kv_pages
