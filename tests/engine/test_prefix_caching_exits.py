"""Shared prefixes where tokens exit and prompts stop early: what is shared is what would be computed, and no more."""

from __future__ import annotations

import dataclasses
import random
from contextlib import suppress
from typing import Any

import pytest

from exit_helpers import NUM_LAYERS, forced_engine
from prefix_helpers import LIMITS, PAGE_SIZE, cached, family, make, shared_pages_guarded
from references import GREEDY, Interrupt, assert_idle, greedy, loaded, tokens
from tide_ray import EngineConfig, SamplingParams, TideEngine
from tiny_models import build_tiny_model

KV_POLICIES = ("fitted", "copy", "deferred", "full")


def exiting(prompts: list[list[int]], engine: TideEngine, num_tokens: int = 20) -> list[Any]:
    """Answers whose forced exits follow from the prompt's number alone."""
    params = [
        SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, seed=n) for n in range(len(prompts))
    ]
    outputs = engine.generate(prompts, params)
    assert_idle(engine)
    return outputs


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("holds", [(1, 1), (3, 2)])
def test_answers_with_exits_do_not_depend_on_sharing(
    kv_policy: str, holds: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = build_tiny_model("llama"), family(6)
    options: dict[str, Any] = {"kv_policy": kv_policy, "holds": holds}
    engines = [forced_engine(model, (1, 3), (0.04, 0.04), prefix_caching=is_on, **options) for is_on in (True, False)]
    turns = []
    for engine in engines:
        with shared_pages_guarded(engine, monkeypatch):
            first = exiting(prompts, engine)
            follow_ups = [p + o.outputs[0].token_ids for p, o in zip(prompts, first, strict=True)]
            second = exiting(follow_ups, engine)
        turns.append([(o.outputs[0].token_ids, o.outputs[0].exit_layers) for o in [*first, *second]])
        if engine is engines[0]:
            assert cached(first) == [0] + [20] * 5
            # An answer's pages are found again up to the first token that exited early, and no further.
            for prompt, one, two in zip(prompts, first, second, strict=True):
                depths = [NUM_LAYERS] * len(prompt) + one.outputs[0].exit_layers[1:]
                is_full = [depth == NUM_LAYERS for depth in depths]
                num_full = is_full.index(False) if False in is_full else len(is_full)
                assert two.num_cached_tokens == num_full // PAGE_SIZE * PAGE_SIZE
            assert {two.num_cached_tokens > len(p) for p, two in zip(prompts, second, strict=True)} == {True, False}
    assert turns[0] == turns[1]


@pytest.mark.parametrize("policy", [{"exit_layer": 2}, {"skip_layers": (1, 2)}], ids=str)
def test_a_fixed_set_of_layers_shares_as_full_depth_does(policy: dict[str, Any]) -> None:
    prompts = family(5)
    answers = []
    for is_on in (True, False):
        engine = make(policy="static", prefix_caching=is_on, **policy)
        first = engine.generate(prompts, GREEDY)
        second = engine.generate([p + t for p, t in zip(prompts, tokens(first), strict=True)], GREEDY)
        answers.append(tokens([*first, *second]))
        assert not is_on or all(c > len(p) for c, p in zip(cached(second), prompts, strict=True))
    assert answers[0] == answers[1]


def stopping_engine(**changes: Any) -> TideEngine:
    """Some half of the prompt tokens stop at the first boundary."""
    return forced_engine(build_tiny_model("llama"), (1, 3), (0.0, 0.0), prefill_thresholds=[0.5, 0.5], **changes)


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
def test_with_prefill_exits_equal_prompts_have_equal_answers(kv_policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [family(1)[0]] * 3
    alone = tokens(exiting(prompts[:1], stopping_engine(kv_policy=kv_policy, prefill_tail=4, prefix_caching=False)))
    engine = stopping_engine(kv_policy=kv_policy, prefill_tail=4)
    with shared_pages_guarded(engine, monkeypatch):
        outputs = [*exiting(prompts, engine), *exiting(prompts, engine)]
    assert tokens(outputs) == alone * 6
    assert cached(outputs) == [0] + [16] * 5, "23 tokens, the last 4 of which run every layer for each"
    assert engine.stats.num_prefill_exits > 0


def test_the_last_tokens_of_a_prompt_run_every_layer_for_each_prompt() -> None:
    beginning = family(1)[0]
    engine = stopping_engine(prefill_tail=8)
    exiting([beginning + [9] * 20], engine)
    before = engine.stats.rows_through_layer[3]
    assert cached(exiting([beginning], engine, 1)) == [12]
    assert engine.stats.rows_through_layer[3] - before >= 8


def test_full_depth_and_prompts_that_stop_never_share_a_page() -> None:
    prompts = family(4)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    full = dataclasses.replace(params, exit_policy="full")
    expected = [greedy(build_tiny_model("llama"), prompt, 12) for prompt in prompts]
    alone = stopping_engine(prefix_caching=False, prefill_tail=1)
    stopped = tokens(alone.generate(prompts[:1], params))
    assert stopped != expected[:1]
    for first, second in ((params, full), (full, params)):
        engine = stopping_engine(prefill_tail=1)
        outputs = {first: engine.generate(prompts, first), second: engine.generate(prompts, second)}
        assert tokens(outputs[full]) == expected
        assert tokens(outputs[params])[:1] == stopped
        assert cached(outputs[first]) == cached(outputs[second]) == [0] + [20] * 3
        assert_idle(engine)


# ---- anything at once ----


class Fault(Exception):
    """A launch that fails."""


@pytest.mark.parametrize("kv_policy", [None, "fitted", "deferred"])
@pytest.mark.parametrize("seed", range(3))
def test_over_any_workload_answers_are_right_and_no_page_leaks(kv_policy: str | None, seed: int) -> None:
    """Few pages, prompts that begin alike, several completions, aborts, failing launches: all of it at random."""
    chance = random.Random(seed)
    model = build_tiny_model("llama")
    prompts = [prompt for group in range(3) for prompt in family(6, shared=4 * group + 9, seed=group)]

    def engine_with(**changes: Any) -> TideEngine:
        if kv_policy is None:
            return TideEngine(loaded(model), EngineConfig(**LIMITS, **changes))
        return forced_engine(model, (1, 3), (0.1, 0.1), kv_policy=kv_policy, **{**LIMITS, **changes})

    def params(number: int) -> SamplingParams:
        num_tokens, temperature = 1 + number * 5 % 16, float(number % 2)
        return SamplingParams(
            temperature=temperature, max_tokens=num_tokens, ignore_eos=True, seed=number, n=1 + number % 3
        )

    asked = [(chance.choice(prompts), params(number)) for number in range(60)]
    calm = engine_with(max_num_seqs=4, prefix_caching=False)
    expected = calm.generate([prompt for prompt, _ in asked], [one for _, one in asked])
    engine = engine_with(max_num_seqs=6, max_num_batched_tokens=24)
    taken = engine.scheduler.pool.allocate(engine.num_kv_pages - 16)
    assert taken is not None
    done: dict[str, list[list[int]]] = {}
    aborted: set[str] = set()
    left = dict(enumerate(asked))
    while left or engine.has_unfinished_requests():
        for number in list(left)[: chance.randint(0, 2)]:
            engine.add_request(str(number), *left.pop(number))
        running = engine.requests.running
        if running and chance.random() < 0.05:
            aborted.add(name := chance.choice(running))
            engine.abort(name)
        if running and chance.random() < 0.03:
            Interrupt(engine, 0, Fault)
        with suppress(Fault):
            done |= {o.request_id: [c.token_ids for c in o.outputs] for o in engine.step()}
    assert len(done) + len(aborted) == 60
    for number, output in enumerate(expected):
        if str(number) in done:
            assert done[str(number)] == [completion.token_ids for completion in output.outputs]
    assert engine.stats.num_preemptions > 0
    assert engine.stats.num_cached_tokens > 0
    engine.scheduler.pool.release(taken)
    assert_idle(engine)
