"""Policy ``static``: the model with some layers left out, and nothing of those layers ever runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from references import assert_idle, greedy, ragged_prompts, without_layers
from tide_ray import SamplingParams, TideEngine, UserError
from tide_ray.engine.stages import evenly_spaced_layers
from tiny_models import TOKENIZER_VOCAB_SIZE, build_tiny_model

MakeEngine = Callable[..., TideEngine]
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
NUM_LAYERS = 4

CASES: dict[str, tuple[dict[str, Any], set[int]]] = {
    "exit_layer 1": ({"exit_layer": 1}, {1, 2, 3}),
    "exit_layer 3": ({"exit_layer": 3}, {3}),
    "exit_layer 4": ({"exit_layer": 4}, set()),
    "skip first": ({"skip_layers": (0,)}, {0}),
    "skip 1 and 2": ({"skip_layers": (1, 2)}, {1, 2}),
    "skip a list, in any order, twice": ({"skip_layers": [2, 1, 2]}, {1, 2}),
    "skip last": ({"skip_layers": (3,)}, {3}),
    "static_cost 0.75": ({"static_cost": 0.75}, {1}),
    "static_cost 0.5": ({"static_cost": 0.5}, {1, 2}),
    "static_cost 1": ({"static_cost": 1.0}, set()),
}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return ragged_prompts(8, TOKENIZER_VOCAB_SIZE, longest=20)


@pytest.mark.parametrize(("options", "skipped"), CASES.values(), ids=CASES.keys())
def test_output_is_that_of_the_model_without_the_skipped_layers(
    make_engine: MakeEngine, prompts: list[list[int]], options: dict[str, Any], skipped: set[int]
) -> None:
    engine = make_engine(policy="static", max_num_seqs=3, max_num_batched_tokens=9, **options)

    def refuse(_module: object, _args: object) -> None:
        raise AssertionError("a skipped layer ran")

    for layer in skipped:
        engine.runner.adapter.running_layers[layer].register_forward_pre_hook(refuse)
    outputs = engine.generate(prompts, GREEDY)
    smaller = without_layers(build_tiny_model("llama", vocab_size=TOKENIZER_VOCAB_SIZE), skipped)
    expected = [greedy(smaller, prompt, GREEDY.max_tokens) for prompt in prompts]
    assert [output.outputs[0].token_ids for output in outputs] == expected

    depth = NUM_LAYERS - len(skipped)
    assert all(output.outputs[0].exit_layers == [depth] * GREEDY.max_tokens for output in outputs)
    num_rows = sum(len(prompt) + GREEDY.max_tokens - 1 for prompt in prompts)
    assert engine.stats.rows_through_layer == [0 if i in skipped else num_rows for i in range(NUM_LAYERS)]
    assert engine.stats.sum_exit_layers == depth * engine.stats.num_generated_tokens
    kept = [layer for layer in range(NUM_LAYERS) if layer not in skipped]
    assert engine.describe()["stages"] == [{"name": "static", "layers": kept, "depth": depth}]
    assert_idle(engine)


def test_the_answers_of_different_depths_differ(prompts: list[list[int]]) -> None:
    """Or the comparison above would say nothing."""
    model = build_tiny_model("llama", vocab_size=TOKENIZER_VOCAB_SIZE)
    answers = [
        tuple(greedy(without_layers(model, skipped), prompts[0], 10)) for skipped in ((), (3,), (1,), (0,), (1, 2))
    ]
    assert len(set(answers)) == len(answers)


def test_sampled_requests_and_preemption_work_at_a_fixed_depth(
    make_engine: MakeEngine, make_starved_engine: MakeEngine, prompts: list[list[int]]
) -> None:
    params = [SamplingParams(seed=i, max_tokens=10, ignore_eos=True) for i in range(len(prompts))]
    plenty = make_engine(policy="static", exit_layer=2).generate(prompts, params)
    engine = make_starved_engine(9, policy="static", exit_layer=2, max_model_len=32, max_num_seqs=6)
    starved = engine.generate(prompts, params)
    assert engine.stats.num_preemptions > 0
    assert [o.outputs[0].token_ids for o in starved] == [o.outputs[0].token_ids for o in plenty]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit_layer": 0}, "exit_layer must be from 1 to 4, got 0"),
        ({"exit_layer": 5}, "exit_layer must be from 1 to 4, got 5"),
        ({"exit_layer": -1}, "exit_layer must be from 1 to 4, got -1"),
        ({"skip_layers": (1, 4)}, "skip_layers must hold layers from 0 to 3, got 4"),
        ({"skip_layers": (-1,)}, "skip_layers must hold layers from 0 to 3, got -1"),
        ({"skip_layers": (0, 1, 2, 3)}, "skip_layers must leave at least one layer, got all 4"),
    ],
)
def test_a_layer_that_the_model_does_not_have_is_refused(
    make_engine: MakeEngine, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        make_engine(policy="static", **options)
    assert str(caught.value) == message


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 7, 12, 30, 80])
@pytest.mark.parametrize("cost", [0.01, 0.25, 0.5, 0.66, 0.9, 1.0])
def test_unified_layer_skipping_keeps_the_ends_and_an_even_spacing(num_layers: int, cost: float) -> None:
    kept = evenly_spaced_layers(num_layers, cost)
    assert len(kept) == min(num_layers, max(2, round(cost * num_layers)))
    assert kept[0] == 0
    assert kept[-1] == num_layers - 1
    gaps = torch.tensor(kept).diff()
    assert len(gaps) == 0 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)
    if cost == 1.0:
        assert kept == tuple(range(num_layers))
