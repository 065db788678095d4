"""``stream``: the answer as it grows, never showing what a later token takes back."""

from __future__ import annotations

import pytest

from references import CYCLE, ENDINGS, assert_idle, greedy_params
from tide_ray import RequestOutput, SamplingParams, TideEngine


def texts(outputs: list[RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


CASES = {
    **ENDINGS,
    "sampled": ("a", SamplingParams(temperature=1.5, seed=3, max_tokens=12)),
}


@pytest.mark.parametrize(("prompt", "params"), CASES.values(), ids=CASES.keys())
def test_a_stream_grows_and_ends_as_generate(cycle_engine: TideEngine, prompt: str, params: SamplingParams) -> None:
    outputs = list(cycle_engine.stream(prompt, params))
    assert_idle(cycle_engine)
    final, expected = outputs[-1].outputs[0], cycle_engine.generate(prompt, params)[0].outputs[0]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert (final.text, final.token_ids) == (expected.text, expected.token_ids)
    assert (final.finish_reason, final.stop_reason) == (expected.finish_reason, expected.stop_reason)
    assert [len(output.outputs[0].token_ids) for output in outputs] == list(range(1, len(final.token_ids) + 1))
    for output in outputs[:-1]:
        partial = output.outputs[0]
        assert final.text.startswith(partial.text)
        assert partial.finish_reason is None
        assert partial.token_ids == final.token_ids[: len(partial.token_ids)]
        assert len(partial.exit_layers) == len(partial.token_times_us) == len(partial.token_ids)
    lengths = [len(text) for text in texts(outputs)]
    assert lengths == sorted(lengths)


def test_text_arrives_with_its_token(cycle_engine: TideEngine) -> None:
    assert texts(list(cycle_engine.stream("a", greedy_params(max_tokens=4)))) == ["b", "bc", "bcd", "bcde"]


def test_a_partial_stop_string_is_never_shown(cycle_engine: TideEngine) -> None:
    shown = texts(list(cycle_engine.stream("a", greedy_params(stop="efgh"))))
    assert shown == ["b", "bc", "bcd", "bcd", "bcd", "bcd", "bcd"]


def test_what_was_held_back_for_a_stop_string_follows_when_it_does_not_come(cycle_engine: TideEngine) -> None:
    shown = texts(list(cycle_engine.stream("a", greedy_params(stop="cdX", max_tokens=5))))
    assert shown == ["b", "b", "b", "bcde", "bcdef"]


def test_characters_of_several_tokens_appear_whole(cycle_engine: TideEngine) -> None:
    shown = texts(list(cycle_engine.stream("z", greedy_params(max_tokens=14))))
    assert not any("\ufffd" in text for text in shown)
    assert list(dict.fromkeys(shown)) == [" ", " é", " é日", " é日€", " é日€😀", " é日€😀A"]


def test_several_completions_stream_together(cycle_engine: TideEngine) -> None:
    outputs = list(cycle_engine.stream("a", SamplingParams(n=3, seed=5, temperature=1.5, max_tokens=6)))
    assert [completion.index for completion in outputs[-1].outputs] == [0, 1, 2]
    expected = cycle_engine.generate("a", SamplingParams(n=3, seed=5, temperature=1.5, max_tokens=6))[0]
    assert [c.token_ids for c in outputs[-1].outputs] == [c.token_ids for c in expected.outputs]


def test_nothing_happens_before_the_first_output_is_asked_for(cycle_engine: TideEngine) -> None:
    stream = cycle_engine.stream("a", greedy_params())
    assert_idle(cycle_engine)
    stream.close()


def test_an_abandoned_stream_frees_its_pages(cycle_engine: TideEngine) -> None:
    stream = cycle_engine.stream("a", greedy_params())
    for _ in range(3):
        next(stream)
    assert cycle_engine.scheduler.pool.num_free < cycle_engine.num_kv_pages
    stream.close()
    assert_idle(cycle_engine)


def test_a_rejected_prompt_streams_one_output_with_its_error(cycle_engine: TideEngine) -> None:
    (output,) = cycle_engine.stream("", greedy_params())
    assert output.finished
    assert "prompt must have at least one token" in output.error
    assert output.outputs[0].finish_reason == "error"
    assert_idle(cycle_engine)


def test_two_streams_and_a_generate_on_one_engine_each_get_their_own(cycle_engine: TideEngine) -> None:
    """They drive one loop: a stream once ended in a KeyError when another call had run its last step."""
    first, second = (
        cycle_engine.stream("a", greedy_params(max_tokens=6)),
        cycle_engine.stream("m", greedy_params(max_tokens=3)),
    )
    shown = [texts([next(first)])[0], texts([next(second)])[0]]
    assert shown == ["b", "n"]
    assert cycle_engine.generate("A", greedy_params())[0].outputs[0].text == CYCLE.partition("A")[2]
    assert texts(list(second))[-1] == "nop"
    assert texts(list(first))[-1] == "bcdefg"
    assert_idle(cycle_engine)
