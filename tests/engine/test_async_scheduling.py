"""Steps queued before the last one's tokens are read: the answers are those of an engine that waits for each step."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from exit_helpers import forced_engine
from references import GREEDY, Interrupt, assert_idle, tokens
from tide_ray import CompletionOutput, RequestOutput, SamplingParams, TideEngine
from tide_ray.engine import preparation, runner
from tide_ray.engine.cost_model import LaunchPlan
from tide_ray.engine.rows import RowBatch, RowSpan, build_rows
from tiny_models import TOKENIZER_VOCAB_SIZE, build_tiny_model

MakeEngine = Callable[..., TideEngine]

VARIANTS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.9, "seed": 4, "top_p": 0.9, "top_k": 40, "min_tokens": 5},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 1.2, "seed": 5, "n": 3, "logprobs": 2},
    {"temperature": 0.0, "logprobs": 0, "max_tokens": 1},
    {"temperature": 2.0, "seed": 6, "stop_token_ids": tuple(range(20, 60)), "min_tokens": 3},
    {"temperature": 2.0, "seed": 7, "ignore_eos": True, "max_tokens": 20},
]


@pytest.fixture(scope="module")
def params() -> list[SamplingParams]:
    return [SamplingParams(**{"max_tokens": 9, **VARIANTS[n % len(VARIANTS)]}) for n in range(10)]


def facts(outputs: list[RequestOutput]) -> list[Any]:
    """All that must not depend on when steps are queued."""
    return [[fact(out) for out in output.outputs] for output in outputs]


def fact(out: CompletionOutput) -> tuple[Any, ...]:
    logprobs = [sorted(entries) for entries in out.logprobs or []]
    return out.text, out.token_ids, out.exit_layers, out.finish_reason, out.stop_reason, logprobs


class Watch:
    """Counts launches, and those queued while another is in flight; sees to it that no page has two owners."""

    def __init__(self, engine: TideEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_launches = self.num_ahead = 0
        run = engine.runner.run

        def noted(spans: Any, ahead: Any = None) -> Any:
            self.num_launches += 1
            self.num_ahead += ahead is not None
            return run(spans, ahead)

        def checked(spans: list[RowSpan], page_size: int, *rest: Any, **options: Any) -> RowBatch:
            written = [set(span.pages[span.positions // page_size]) for span in spans]
            assert len(set().union(*written)) == sum(map(len, written)), "two sequences write to one page"
            return build_rows(spans, page_size, *rest, **options)

        monkeypatch.setattr(engine.runner, "run", noted)
        monkeypatch.setattr(runner, "build_rows", checked)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_num_seqs": 16},
        {"max_num_seqs": 3},
        {"max_num_seqs": 5, "max_num_batched_tokens": 4},
        {"max_num_seqs": 1},
        {"max_num_seqs": 4, "prefix_caching": False},
    ],
    ids=str,
)
def test_answers_are_those_of_steps_that_wait(
    make_engine: MakeEngine,
    prompts: list[list[int]],
    params: list[SamplingParams],
    monkeypatch: pytest.MonkeyPatch,
    limits: dict[str, Any],
) -> None:
    waiting, ahead = make_engine(**limits), make_engine(async_scheduling="on", **limits)
    assert (waiting.describe()["async_scheduling"], ahead.describe()["async_scheduling"]) == (False, True)
    expected = facts(waiting.generate(prompts, params))
    watch = Watch(ahead, monkeypatch)
    outputs = ahead.generate(prompts, params)
    assert facts(outputs) == expected
    assert watch.num_ahead > watch.num_launches / 3
    assert_idle(ahead)
    for output in outputs:
        for out in output.outputs:
            assert len(out.token_times_us) == len(out.token_ids)
            assert all(time >= 0 for time in out.token_times_us)
    assert ahead.stats.num_generated_tokens == waiting.stats.num_generated_tokens
    assert ahead.stats.num_prompt_tokens == waiting.stats.num_prompt_tokens


def test_answers_of_known_length_cost_no_further_row(make_engine: MakeEngine, prompts: list[list[int]]) -> None:
    engines = [make_engine(async_scheduling=choice, max_num_seqs=16) for choice in ("off", "on")]
    answers = [tokens(engine.generate(prompts, GREEDY)) for engine in engines]
    assert answers[0] == answers[1]
    assert engines[1].stats == engines[0].stats


def test_tokens_after_the_end_are_dropped(make_cycle_engine: MakeEngine) -> None:
    """EOS and stop strings are seen a step late: one row more is run, and its token goes nowhere."""
    waiting, ahead = make_cycle_engine(), make_cycle_engine(async_scheduling="on")
    params = SamplingParams(temperature=0, max_tokens=40, stop=["MNO"])
    outputs = [engine.generate(["a", "A", "N"], params) for engine in (waiting, ahead)]
    assert facts(outputs[1]) == facts(outputs[0])
    assert [output.outputs[0].finish_reason for output in outputs[1]] == ["length", "stop", "stop"]
    assert outputs[1][2].outputs[0].text == "OP"
    assert ahead.stats.num_dropped_tokens == 2
    extra = [a - b for a, b in zip(ahead.stats.rows_through_layer, waiting.stats.rows_through_layer, strict=True)]
    assert extra == [2] * ahead.num_layers
    assert_idle(ahead)


@pytest.mark.parametrize("num_pages", [13, 16, 20])
def test_preemption_changes_nothing(
    make_starved_engine: MakeEngine,
    make_engine: MakeEngine,
    prompts: list[list[int]],
    params: list[SamplingParams],
    monkeypatch: pytest.MonkeyPatch,
    num_pages: int,
) -> None:
    expected = facts(make_engine().generate(prompts, params))
    engine = make_starved_engine(num_pages, max_model_len=52, max_num_seqs=6, async_scheduling="on")
    watch = Watch(engine, monkeypatch)
    assert facts(engine.generate(prompts, params)) == expected
    assert engine.stats.num_preemptions > 0
    assert watch.num_ahead
    assert_idle(engine)


def test_an_abort_in_flight_leaves_the_others_alone(make_engine: MakeEngine, prompts: list[list[int]]) -> None:
    expected = tokens(make_engine().generate(prompts, GREEDY))
    engine = make_engine(async_scheduling="on")
    for number, prompt in enumerate(prompts):
        engine.add_request(f"{number}", prompt, GREEDY)
    done: dict[str, RequestOutput] = {}
    for step in range(200):
        done.update((output.request_id, output) for output in engine.step())
        if step in (0, 1, 4, 9):
            engine.abort(f"{step}")
            engine.abort(f"{step}")
    assert set(done) >= {str(number) for number in range(len(prompts)) if number not in (0, 1, 4, 9)}
    assert all(done[name].outputs[0].token_ids == expected[int(name)] for name in done)
    assert not {"0", "1"} & set(done)
    assert engine.stats.num_dropped_tokens > 0
    assert_idle(engine)


def test_shared_prefixes_are_found_and_are_right(make_engine: MakeEngine) -> None:
    """Pages of prompts, and of answers that other prompts go on from."""
    first = [[7, 8, 9, 10, 11, 12, 13, 14, 20 + n] for n in range(6)]
    engines = [make_engine(async_scheduling=choice) for choice in ("off", "on")]
    prompts = first
    for _ in range(2):
        answers = [tokens(engine.generate(prompts, GREEDY)) for engine in engines]
        assert answers[0] == answers[1]
        prompts = [prompt + answer for prompt, answer in zip(first, answers[0], strict=True)]
    assert engines[1].stats.num_cached_tokens == engines[0].stats.num_cached_tokens > 6 * 16
    assert_idle(engines[1])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("num_launches", [0, 1, 3, 14])
def test_a_failed_launch_loses_no_token(
    make_engine: MakeEngine,
    prompts: list[list[int]],
    answers: list[list[int]],
    num_launches: int,
    error: type[BaseException],
) -> None:
    """What was in flight is computed again; so it is where reading fails, as it does on a GPU after a failed kernel."""
    engine = make_engine(async_scheduling="on")
    for number, prompt in enumerate(prompts):
        engine.add_request(f"{number}", prompt, GREEDY)
    done: dict[str, RequestOutput] = {}

    def step(times: int = 1) -> None:
        for _ in range(times):
            done.update((output.request_id, output) for output in engine.step())

    Interrupt(engine, num_launches, error)
    with pytest.raises(error, match="interrupted"):
        step(times=100)
    step(times=2)
    commit = engine.committer.commit

    def fails(_sampled: Any) -> Any:
        raise error("unread")

    engine.committer.commit = fails  # type: ignore[method-assign]
    with pytest.raises(error, match="unread"):
        step()
    engine.committer.commit = commit  # type: ignore[method-assign]
    while engine.has_unfinished_requests():
        step()
    assert [done[f"{n}"].outputs[0].token_ids for n in range(len(prompts))] == answers
    assert_idle(engine)


def test_a_stream_yields_every_token_by_itself(make_cycle_engine: MakeEngine) -> None:
    engine = make_cycle_engine(async_scheduling="on")
    outputs = list(engine.stream("a", SamplingParams(temperature=0, max_tokens=6)))
    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 2, 3, 4, 5, 6]
    assert [output.finished for output in outputs] == [False] * 5 + [True]
    assert outputs[-1].outputs[0].text == "bcdefg"


def exiting_engine(**changes: Any) -> TideEngine:
    changes = {"async_scheduling": "on", **changes}
    return forced_engine(build_tiny_model("llama", vocab_size=TOKENIZER_VOCAB_SIZE), (1,), (0.5,), **changes)


def test_an_engine_whose_exits_are_off_runs_ahead(
    prompts: list[list[int]], answers: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is never slower than full depth on a GPU only if it may do what full depth does."""
    engine = exiting_engine()
    assert engine.runner.planner is not None
    engine.runner.planner.stop()
    watch = Watch(engine, monkeypatch)
    assert tokens(engine.generate(prompts, GREEDY)) == answers
    assert watch.num_ahead > watch.num_launches // 2
    assert_idle(engine)


@pytest.mark.parametrize("kv_policy", ["fitted", "deferred"])
def test_a_boundary_is_asked_only_when_all_tokens_are_known(
    prompts: list[list[int]], kv_policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Boundaries go on and off while steps are in flight; what is asked, probes included, never runs ahead."""
    engine = exiting_engine(kv_policy=kv_policy)
    planner, exits = engine.runner.planner, engine.runner.exits
    assert planner is not None
    assert exits is not None
    rng = random.Random(0)
    asked_ahead: list[bool] = []
    in_flight: list[bool] = []
    run, ask = engine.runner.run, exits._ask

    def plan(residents: int) -> LaunchPlan:
        planner._steps += 1
        if rng.random() < 0.25:
            planner.current = LaunchPlan((not planner.current.is_on[0],), (1,))
        return planner.current

    def noted(spans: Any, ahead: Any = None) -> Any:
        in_flight.append(ahead is not None)
        return run(spans, ahead)

    def asked(*given: Any) -> None:
        asked_ahead.append(in_flight[-1])
        ask(*given)

    monkeypatch.setattr(planner, "plan", plan)
    monkeypatch.setattr(engine.runner, "run", noted)
    monkeypatch.setattr(exits, "_ask", asked)
    outputs = [output.outputs[0] for output in engine.generate(prompts, GREEDY)]
    assert any(in_flight)
    assert asked_ahead
    assert not any(asked_ahead)
    assert {len(out.token_ids) for out in outputs} == {len(out.exit_layers) for out in outputs} == {GREEDY.max_tokens}
    assert {depth for out in outputs for depth in out.exit_layers} == {1, 4}
    assert_idle(engine)


def test_where_prompt_tokens_may_stop_steps_wait(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger=preparation.logger.name):
        engine = exiting_engine(exits="given", prefill_share=0.5)
    assert engine.describe()["async_scheduling"] is False
    assert [record.message for record in caplog.records] == [
        "async_scheduling: with prefill exits or drafts every step waits for the one before"
    ]


@pytest.mark.parametrize("seed", range(6))
def test_whatever_comes_and_goes_answers_are_the_same(
    make_starved_engine: MakeEngine,
    make_engine: MakeEngine,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    """Requests that arrive and are aborted at random, with few pages, few places and small chunks."""
    rng = random.Random(seed)
    requests = [
        (rng.choice(prompts)[: rng.randint(1, 20)], SamplingParams(**{"max_tokens": rng.randint(5, 12), **chosen}))
        for chosen in (rng.choice(VARIANTS) | {"seed": n} for n in range(24))
    ]
    reference = make_engine()
    expected = facts(reference.generate([prompt for prompt, _ in requests], [params for _, params in requests]))
    engine = make_starved_engine(
        rng.randint(11, 24),
        max_model_len=44,
        max_num_seqs=rng.randint(1, 6),
        max_num_batched_tokens=rng.choice([3, 16, 64]),
        prefix_caching=bool(seed % 2),
        async_scheduling="on",
    )
    watch = Watch(engine, monkeypatch)
    left, done, aborted = list(range(len(requests))), dict[str, RequestOutput](), set[str]()
    while left or engine.has_unfinished_requests():
        while left and rng.random() < 0.4:
            number = left.pop(0)
            engine.add_request(f"{number}", *requests[number])
        if rng.random() < 0.05:
            aborted.add(name := f"{rng.randrange(len(requests))}")
            engine.abort(name)
        done.update((output.request_id, output) for output in engine.step())
    for name, output in done.items():
        assert facts([output]) == [expected[int(name)]], name
    assert set(done) | aborted == {f"{n}" for n in range(len(requests))}
    assert len(done) > 15
    assert watch.num_ahead > 5
    assert_idle(engine)
    assert np.all([not sequence.num_ahead for sequence in engine.scheduler.residents])
