"""Shared prefixes in the engine at full depth: computed once, never written again, and no answer changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from exit_helpers import NUM_LAYERS
from prefix_helpers import PAGE_SIZE, cached, family, make, shared_pages_guarded
from references import GREEDY, Interrupt, assert_idle, cached_nodes, greedy, tokens
from tide_ray import SamplingParams, TideEngine
from tiny_models import TOKENIZER_VOCAB_SIZE, build_tiny_model

ARCHITECTURES = ("llama", "mistral", "gemma2", "gemma3_text", "gpt2", "falcon")  # windows, soft caps, learned positions

MakeEngine = Callable[..., TideEngine]


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
