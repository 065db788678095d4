"""When and how an answer ends: EOS, stop ids, stop strings, length, and min_tokens that delays them.

The model follows ``references.CYCLE`` (a to z, some characters of several bytes, A to P, EOS, a ...), one token a byte.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel

from references import CYCLE, assert_idle, cycle_model, greedy, loaded
from tide_ray import CompletionOutput, EngineConfig, SamplingParams, TideEngine
from tide_ray.models import load
from tiny_models import EOS_ID, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CONFIG = EngineConfig(dtype="float32", device="cpu", page_size=4, max_model_len=128, max_num_seqs=4)


def token_id(character: str) -> int:
    (number,) = TOKENIZER(character)["input_ids"]
    return number


def answer(engine: TideEngine, prompt: str, **params: object) -> CompletionOutput:
    values: dict[str, object] = {"temperature": 0, "max_tokens": 40, **params}
    output = engine.generate(prompt, SamplingParams(**values))[0]
    assert not output.error
    assert_idle(engine)
    completion = output.outputs[0]
    assert len(completion.token_ids) == len(completion.exit_layers) == len(completion.token_times_us)
    return completion


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return cycle_model()


def hf_generate(model: PreTrainedModel, prompt: str, **options: object) -> list[int]:
    ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
    settings = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0, "eos_token_id": EOS_ID, **options}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    return output[0, ids.shape[1] :].tolist()


# ---- length and EOS ----


def test_max_tokens_ends_as_length(cycle_engine: TideEngine) -> None:
    completion = answer(cycle_engine, "a", max_tokens=5)
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("bcdef", "length", None)


def test_eos_ends_the_answer_is_among_the_tokens_and_not_in_the_text(
    cycle_engine: TideEngine, reference: PreTrainedModel
) -> None:
    completion = answer(cycle_engine, "M")
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("NOP", "stop", None)
    assert completion.token_ids == hf_generate(reference, "M")
    assert completion.token_ids[-1] == EOS_ID


def test_eos_as_the_last_allowed_token_is_a_stop(cycle_engine: TideEngine) -> None:
    assert answer(cycle_engine, "M", max_tokens=4).finish_reason == "stop"
    assert answer(cycle_engine, "M", max_tokens=3).finish_reason == "length"


def test_ignore_eos_generates_past_it(cycle_engine: TideEngine) -> None:
    completion = answer(cycle_engine, "M", max_tokens=8, ignore_eos=True)
    assert (completion.text, completion.finish_reason) == ("NOPabcd", "length")
    assert completion.token_ids[3] == EOS_ID


def test_every_eos_id_of_the_generation_config_ends_the_answer(tmp_path: Path, reference: PreTrainedModel) -> None:
    model = cycle_model()
    eos_ids = [EOS_ID, token_id("k"), token_id("E")]
    model.generation_config = GenerationConfig(eos_token_id=eos_ids, pad_token_id=0, do_sample=False)
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    engine = TideEngine(load(str(tmp_path), dtype="float32", device="cpu"), CONFIG)
    for prompt, text in (("a", "bcdefghij"), ("A", "BCD"), ("M", "NOP")):
        completion = answer(engine, prompt)
        assert (completion.text, completion.finish_reason, completion.stop_reason) == (text, "stop", None)
        assert completion.token_ids == hf_generate(reference, prompt, eos_token_id=eos_ids)
    assert answer(engine, "a", ignore_eos=True, max_tokens=15).text == "bcdefghijklmnop"


def test_a_model_without_eos_runs_to_its_length() -> None:
    engine = TideEngine(loaded(cycle_model(), TOKENIZER, eos_token_ids=()), CONFIG)
    completion = answer(engine, "M", max_tokens=6)
    assert (completion.text, completion.finish_reason) == ("NOPab", "length")


# ---- stop ids ----


def test_a_stop_id_ends_the_answer_and_is_the_reason(cycle_engine: TideEngine) -> None:
    stop_ids = (token_id("q"), token_id("f"))
    completion = answer(cycle_engine, "a", stop_token_ids=stop_ids)
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("bcde", "stop", stop_ids[1])
    assert completion.token_ids[-1] == stop_ids[1]


def test_stop_ids_work_with_ignore_eos(cycle_engine: TideEngine) -> None:
    completion = answer(cycle_engine, "M", stop_token_ids=[token_id("c")], ignore_eos=True)
    assert (completion.text, completion.stop_reason) == ("NOPab", token_id("c"))


def test_a_stop_id_of_one_request_does_not_stop_another(cycle_engine: TideEngine) -> None:
    stop = SamplingParams(temperature=0, max_tokens=6, stop_token_ids=[token_id("d")])
    outputs = cycle_engine.generate(["a", "a", "a"], [stop, dataclasses.replace(stop, stop_token_ids=()), stop])
    assert [output.outputs[0].text for output in outputs] == ["bc", "bcdefg", "bc"]


# ---- stop strings ----


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("d", "bc"),
        ("def", "bc"),
        ("bcd", ""),
        (["xyz", "fgh"], "bcde"),
        (["efghij", "hi"], "bcdefg"),
        (["fgh", "efgh"], "bcd"),
    ],
)
def test_a_stop_string_across_tokens_is_cut_cleanly(
    cycle_engine: TideEngine, reference: PreTrainedModel, stop: str | list[str], text: str
) -> None:
    completion = answer(cycle_engine, "a", stop=stop)
    assert (completion.text, completion.finish_reason) == (text, "stop")
    assert completion.stop_reason in stop
    assert completion.token_ids == hf_generate(reference, "a", stop_strings=stop, tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    ("stop", "text"), [("日", " é"), ("é日", " "), ("€😀A", " é日"), ("\N{GRINNING FACE}", " é日€")]
)
def test_a_stop_string_of_characters_of_several_tokens_is_cut_cleanly(
    cycle_engine: TideEngine, stop: str, text: str
) -> None:
    completion = answer(cycle_engine, "z", stop=stop)
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (text, "stop", stop)
    assert TOKENIZER.decode(completion.token_ids) == text + stop


def test_a_stop_string_that_the_prompt_begins_does_not_match(cycle_engine: TideEngine) -> None:
    assert answer(cycle_engine, "abc", stop="cde", max_tokens=5).text == "defgh"


def test_a_stop_string_completed_by_the_last_allowed_token_is_a_stop(cycle_engine: TideEngine) -> None:
    completion = answer(cycle_engine, "a", stop="ef", max_tokens=5)
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("bcd", "stop", "ef")


@pytest.mark.parametrize(("max_tokens", "reason"), [(3, "length"), (40, "stop")])
def test_the_begin_of_a_stop_string_that_does_not_come_is_text(
    cycle_engine: TideEngine, max_tokens: int, reason: str
) -> None:
    completion = answer(cycle_engine, "M", stop="OP!", max_tokens=max_tokens)
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("NOP", reason, None)


def test_an_answer_cut_inside_a_character_ends_with_its_replacement(cycle_engine: TideEngine) -> None:
    plain = answer(cycle_engine, "z", max_tokens=5)
    assert plain.text == " é\ufffd"
    assert answer(cycle_engine, "z", max_tokens=5, stop="never").text == plain.text


def test_the_earlier_of_eos_and_stop_string_ends_the_answer(cycle_engine: TideEngine) -> None:
    stopped = answer(cycle_engine, "M", stop=["OP", "ab"])
    assert (stopped.text, stopped.stop_reason) == ("N", "OP")
    ended = answer(cycle_engine, "M", stop="ab")
    assert (ended.text, ended.stop_reason) == ("NOP", None)


def test_a_stop_string_across_a_special_token_matches_the_text_without_it(cycle_engine: TideEngine) -> None:
    completion = answer(cycle_engine, "M", stop="Pab", ignore_eos=True)
    assert (completion.text, completion.stop_reason) == ("NO", "Pab")


# ---- min_tokens ----


def test_min_tokens_delays_eos_as_in_hf_generate(cycle_engine: TideEngine, reference: PreTrainedModel) -> None:
    completion = answer(cycle_engine, "M", min_tokens=10, max_tokens=16)
    assert EOS_ID not in completion.token_ids[:10]
    assert len(completion.token_ids) > 10
    assert completion.token_ids == hf_generate(reference, "M", min_new_tokens=10, max_new_tokens=16)


def test_min_tokens_delays_stop_ids(cycle_engine: TideEngine) -> None:
    stop = token_id("d")
    completion = answer(cycle_engine, "a", stop_token_ids=[stop], min_tokens=6, max_tokens=12)
    assert completion.token_ids[:2] == TOKENIZER("bc")["input_ids"]
    assert stop not in completion.token_ids[:6]


def test_eos_may_follow_min_tokens_at_once(cycle_engine: TideEngine) -> None:
    assert answer(cycle_engine, "M", min_tokens=3).text == "NOP"
    assert len(answer(cycle_engine, "M", min_tokens=4).token_ids) > 4


def test_min_tokens_delays_stop_strings_and_later_ones_match(cycle_engine: TideEngine) -> None:
    once_around = len(TOKENIZER(CYCLE)["input_ids"]) + 1
    params = {"stop": "cd", "ignore_eos": True, "max_tokens": 100}
    assert answer(cycle_engine, "a", **params, min_tokens=2).text == "b"
    late = answer(cycle_engine, "a", **params, min_tokens=3)
    assert (late.finish_reason, late.stop_reason) == ("stop", "cd")
    assert len(late.token_ids) == once_around + 3
    assert late.text == CYCLE[1:] + "ab"


# ---- beside others ----


def test_mixed_stops_in_one_batch_are_each_their_own(cycle_engine: TideEngine) -> None:
    cases = [
        ("a", {"stop": "gh"}),
        ("M", {}),
        ("a", {"stop_token_ids": (token_id("e"),)}),
        ("z", {"stop": "😀"}),
        ("M", {"min_tokens": 6, "max_tokens": 9}),
        ("A", {"max_tokens": 3}),
        ("a", {"stop": "pq", "logprobs": 2}),
    ]
    alone = [answer(cycle_engine, prompt, **params) for prompt, params in cases]
    params = [SamplingParams(**{"temperature": 0, "max_tokens": 40, **params}) for _, params in cases]
    together = cycle_engine.generate([prompt for prompt, _ in cases], params)
    for one, output in zip(alone, together, strict=True):
        completion = output.outputs[0]
        assert (completion.text, completion.token_ids) == (one.text, one.token_ids)
        assert (completion.finish_reason, completion.stop_reason) == (one.finish_reason, one.stop_reason)


def test_the_reference_greedy_loop_follows_the_cycle(reference: PreTrainedModel) -> None:
    ids = greedy(reference, TOKENIZER("a")["input_ids"], 60, eos=(EOS_ID,))
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == CYCLE[1:]
