"""Deltas from ``step``: together the whole output, no more often than asked, with text cut where it should be."""

from __future__ import annotations

import pytest

from references import ENDINGS, assert_idle, greedy_params
from tide_ray import CompletionOutput, RequestOutput, SamplingParams, TideEngine


def run(engine: TideEngine, prompt: str, params: SamplingParams, interval_us: int = 0) -> list[RequestOutput]:
    engine.add_request("r", prompt, params, delta_interval_us=interval_us)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert_idle(engine)
    return outputs


def joined(outputs: list[RequestOutput], index: int = 0) -> CompletionOutput:
    parts = [part for output in outputs for part in output.outputs if part.index == index]
    whole = parts[0]
    for part in parts[1:]:
        whole.text += part.text
        for name in ("token_ids", "exit_layers", "token_times_us", "gate_scores", "token_texts"):
            getattr(whole, name).extend(getattr(part, name))
        if part.logprobs is not None and whole.logprobs is not None:
            whole.logprobs += part.logprobs
    whole.finish_reason, whole.stop_reason = parts[-1].finish_reason, parts[-1].stop_reason
    return whole


CASES = {
    **ENDINGS,
    "logprobs": ("a", greedy_params(logprobs=2)),
    "several completions": ("a", SamplingParams(temperature=1.5, seed=3, max_tokens=12, n=3)),
}


@pytest.mark.parametrize("interval_us", [0, 10_000_000], ids=["every token", "gathered"])
@pytest.mark.parametrize(("prompt", "params"), CASES.values(), ids=CASES.keys())
def test_deltas_add_up_to_the_whole_output(
    cycle_engine: TideEngine, prompt: str, params: SamplingParams, interval_us: int
) -> None:
    whole = cycle_engine.generate(prompt, params)[0]
    outputs = run(cycle_engine, prompt, params, interval_us)
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    for expected in whole.outputs:
        for part in (part for output in outputs for part in output.outputs):
            assert len(part.token_texts) == len(part.token_ids) == len(part.exit_layers)
            assert "".join(part.token_texts) == part.text
        found = joined([*run(cycle_engine, prompt, params, interval_us)], expected.index)
        for name in ("text", "token_ids", "exit_layers", "finish_reason", "stop_reason"):
            assert getattr(found, name) == getattr(expected, name), name
        assert (found.logprobs is None) == (expected.logprobs is None)
        if expected.logprobs is not None:
            assert [list(entries) for entries in found.logprobs] == [list(entries) for entries in expected.logprobs]


def test_tokens_are_gathered_between_the_first_and_the_end(cycle_engine: TideEngine) -> None:
    sizes = [
        [
            len(output.outputs[0].token_ids)
            for output in run(cycle_engine, "a", greedy_params(max_tokens=9), interval_us)
        ]
        for interval_us in (0, 10_000_000)
    ]
    assert sizes == [[1] * 9, [1, 8]]


def test_each_token_brings_its_own_text(cycle_engine: TideEngine) -> None:
    found = joined(run(cycle_engine, "y", greedy_params(max_tokens=14)))
    assert found.text == "z é日€😀"
    # A token is a byte here; a character comes with its last one.
    assert found.token_texts == ["z", " ", "", "é", "", "", "日", "", "", "€", "", "", "", "😀"]


def test_a_held_back_text_comes_with_a_later_token(cycle_engine: TideEngine) -> None:
    outputs = run(cycle_engine, "a", greedy_params(stop="def!", max_tokens=8))
    assert [output.outputs[0].text for output in outputs] == ["b", "c", "", "", "", "defg", "h", "i"]
    assert outputs[5].outputs[0].token_texts == ["defg"]


def test_deltas_whole_requests_and_streams_share_an_engine(cycle_engine: TideEngine) -> None:
    cycle_engine.add_request("whole", "a", greedy_params(max_tokens=5))
    cycle_engine.add_request("delta", "a", greedy_params(max_tokens=5), delta_interval_us=0)
    cycle_engine.add_request("left", "a", greedy_params(max_tokens=5), delta_interval_us=0)
    assert len(list(cycle_engine.stream("a", greedy_params(max_tokens=2)))) == 2
    cycle_engine.abort("left")
    outputs = []
    while cycle_engine.has_unfinished_requests():
        outputs += cycle_engine.step()
    assert {output.request_id for output in outputs if output.finished} == {"whole", "delta"}
    assert joined([o for o in outputs if o.request_id == "delta"]).text == "bcdef"
    assert_idle(cycle_engine)


def test_a_rejected_request_is_told_at_once(cycle_engine: TideEngine) -> None:
    [output] = run(cycle_engine, "", greedy_params())
    assert output.finished
    assert "at least one token" in output.error
