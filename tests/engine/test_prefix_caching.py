"""Shared prefixes in the engine: computed once, never written again, and no answer changes."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch

from exit_helpers import NUM_LAYERS, forced_engine
from references import GREEDY, Interrupt, assert_idle, cached_nodes, greedy, loaded, tokens
from tide_ray import EngineConfig, SamplingParams, TideEngine
from tide_ray.engine.kv_cache import KVCache
from tiny_models import TOKENIZER_VOCAB_SIZE, VOCAB_SIZE, build_tiny_model

PAGE_SIZE = 4
LIMITS: dict[str, Any] = {"dtype": "float32", "device": "cpu", "page_size": PAGE_SIZE, "max_model_len": 96}
ARCHITECTURES = ("llama", "mistral", "gemma2", "gemma3_text", "gpt2", "falcon")  # windows, soft caps, learned positions
NUM_SHARED = 22
KV_POLICIES = ("fitted", "copy", "deferred", "full")

MakeEngine = Callable[..., TideEngine]


def family(num: int, *, shared: int = NUM_SHARED, seed: int = 1, vocab_size: int = VOCAB_SIZE) -> list[list[int]]:
    """Prompts with the same first ``shared`` tokens and ends of their own, of 1 to 9 tokens."""
    generator = torch.Generator().manual_seed(seed)

    def some(count: int) -> list[int]:
        return torch.randint(3, vocab_size, (count,), generator=generator).tolist()

    beginning = some(shared)
    return [beginning + some(1 + 3 * n % 9) for n in range(num)]


def make(architecture: str = "llama", **changes: Any) -> TideEngine:
    return TideEngine(loaded(build_tiny_model(architecture)), EngineConfig(**{**LIMITS, "max_num_seqs": 4, **changes}))


def cached(outputs: list[Any]) -> list[int]:
    return [output.num_cached_tokens for output in outputs]


@contextmanager
def shared_pages_guarded(engine: TideEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Fails on a write to a page that is computed and can be found; yields the number of writes that were checked."""
    num_writes = [0]
    pool = engine.scheduler.pool

    def checked(original: Callable[..., None], pages_at: int) -> Callable[..., None]:
        def write(self: KVCache, *args: Any) -> None:
            shared = {node.page for node in cached_nodes(pool) if node.is_computed}
            assert not shared & set(args[pages_at].tolist()), "a row wrote into a shared page"
            num_writes[0] += 1
            original(self, *args)

        return write

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "write", checked(KVCache.write, 1))
        patch.setattr(KVCache, "write_layers", checked(KVCache.write_layers, 1))
        yield num_writes


# ---- full depth ----


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("limits", [{}, {"max_num_batched_tokens": 7}, {"max_num_seqs": 2}], ids=str)
def test_prompts_that_begin_alike_are_answered_as_alone_and_their_beginning_is_computed_once(
    architecture: str, limits: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = build_tiny_model(architecture), family(6)
    expected = [greedy(model, prompt, GREEDY.max_tokens) for prompt in prompts]
    engine = make(architecture, **limits)
    with shared_pages_guarded(engine, monkeypatch) as num_writes:
        outputs = engine.generate(prompts, GREEDY)
        again = engine.generate(prompts, GREEDY)
    assert num_writes[0] > 0
    assert tokens(outputs) == tokens(again) == expected
    assert cached(outputs) == [0] + [20] * 5
    assert cached(again) == [(len(prompt) - 1) // PAGE_SIZE * PAGE_SIZE for prompt in prompts]
    num_computed = 2 * sum(len(prompt) + GREEDY.max_tokens - 1 for prompt in prompts) - sum(cached([*outputs, *again]))
    assert engine.stats.rows_through_layer == [num_computed] * engine.num_layers
    assert engine.stats.num_cached_tokens == sum(cached([*outputs, *again]))
    assert engine.stats.num_prompt_tokens == 2 * sum(map(len, prompts))
    assert_idle(engine)


def test_prompts_of_one_launch_share_what_its_first_one_computes() -> None:
    engine = make(max_num_seqs=8)
    prompts = family(8)
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, GREEDY)
    engine.step()
    assert len(engine.scheduler.residents) == 8
    assert engine.stats.rows_through_layer[0] == sum(map(len, prompts)) - 7 * 20
    held = [sequence.pages[:5] for sequence in engine.scheduler.residents]
    assert held == held[:1] * 8
    for number in range(8):
        engine.abort(str(number))
    assert_idle(engine)


def test_switched_off_nothing_is_shared() -> None:
    model, prompts = build_tiny_model("llama"), family(5)
    expected = [greedy(model, prompt, GREEDY.max_tokens) for prompt in prompts]
    engine = make(prefix_caching=False)
    assert not engine.describe()["prefix_caching"]
    outputs = [*engine.generate(prompts, GREEDY), *engine.generate(prompts, GREEDY)]
    assert tokens(outputs) == expected * 2
    assert cached(outputs) == [0] * 10
    rows = 2 * sum(len(prompt) + GREEDY.max_tokens - 1 for prompt in prompts)
    assert engine.stats.rows_through_layer == [rows] * NUM_LAYERS
    assert engine.scheduler.pool.num_idle == 0


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    """It chooses the first token; with every page of the prompt there, the last page is computed again, privately."""
    engine = make()
    prompt = family(1, shared=15)[0]
    assert len(prompt) == 4 * PAGE_SIZE
    first, second = (engine.generate([prompt], GREEDY)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 12)
    assert first.outputs[0].token_ids == second.outputs[0].token_ids
    assert cached(engine.generate([[*prompt, 9]], GREEDY)) == [16]
    assert_idle(engine)


def test_completions_of_one_prompt_share_it_and_are_those_of_an_engine_without() -> None:
    prompt = family(1)[0]
    params = SamplingParams(temperature=1.0, seed=3, n=5, max_tokens=9, ignore_eos=True)
    answers = []
    for is_on in (True, False):
        engine = make(prefix_caching=is_on)
        outputs = engine.generate([prompt], params)[0].outputs
        answers.append([output.token_ids for output in outputs])
        assert engine.stats.num_cached_tokens == (4 * 20 if is_on else 0)
        assert_idle(engine)
    assert answers[0] == answers[1]
    assert len(set(map(tuple, answers[0]))) == 5


def test_a_conversation_goes_on_from_the_pages_of_its_answer() -> None:
    model, prompt = build_tiny_model("llama"), family(1)[0]
    expected = greedy(model, prompt, 30)
    engine = make()
    answer = engine.generate([prompt], dataclasses.replace(GREEDY, max_tokens=18))[0].outputs[0].token_ids
    # All but the answer's last token were computed: (23 + 17) // 4 pages.
    (second,) = engine.generate([prompt + answer], GREEDY)
    assert (answer + second.outputs[0].token_ids, second.num_cached_tokens) == (expected, 40)
    assert_idle(engine)


def test_a_starved_engine_forgets_prefixes_and_answers_all_the_same(make_starved_engine: MakeEngine) -> None:
    model = build_tiny_model("llama", vocab_size=TOKENIZER_VOCAB_SIZE)
    prompts = [prompt for seed in range(3) for prompt in family(4, seed=seed)]
    expected = [greedy(model, prompt, GREEDY.max_tokens) for prompt in prompts]
    engine = make_starved_engine(14, max_model_len=48, max_num_seqs=8)
    for _ in range(2):
        outputs = engine.generate(prompts, GREEDY)
        assert tokens(outputs) == expected
        assert_idle(engine)
    assert engine.stats.num_preemptions > 0
    assert 0 < engine.stats.num_cached_tokens < engine.stats.num_prompt_tokens


def test_warming_up_leaves_no_prefix() -> None:
    engine = make()
    engine.warm_up()
    assert cached_nodes(engine.scheduler.pool) == []
    assert cached(engine.generate([[0] * 16], GREEDY)) == [0]


# ---- launches that fail ----


@pytest.mark.parametrize("is_aborted", [False, True])
def test_pages_of_a_failed_launch_are_not_taken_for_computed(is_aborted: bool) -> None:
    """What others share of a sequence that is gone nobody would compute, and its pages hold what they held before."""
    model, prompts = build_tiny_model("llama"), family(4)
    expected = [greedy(model, prompt, GREEDY.max_tokens) for prompt in prompts]
    engine = make()
    engine.generate([[5] * 90], GREEDY)  # so that pages hold something
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, GREEDY)
    Interrupt(engine, 0, RuntimeError)
    with pytest.raises(RuntimeError, match="interrupted"):
        engine.step()
    if is_aborted:
        engine.abort("0")
    done = {}
    while engine.has_unfinished_requests():
        done |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
    assert [done[str(n)] for n in range(is_aborted, 4)] == expected[is_aborted:]
    assert tokens(engine.generate(prompts, GREEDY)) == expected
    assert_idle(engine)


def test_a_failed_launch_leaves_nothing_to_find() -> None:
    engine = make()
    Interrupt(engine, 0, RuntimeError)
    with pytest.raises(RuntimeError, match="interrupted"):
        engine.generate(family(4), GREEDY)
    assert cached_nodes(engine.scheduler.pool) == []
    assert_idle(engine)


# ---- exits ----


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
        running = list(engine._requests)
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
