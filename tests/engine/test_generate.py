"""``generate`` and the ``add_request`` / ``step`` loop: shapes, limits, counters, and what never changes an answer."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from references import GREEDY, NUM_PROMPTS, assert_idle, tokens
from tide_ray import SamplingParams, TideEngine, UserError

MakeEngine = Callable[..., TideEngine]
CHAT = [{"role": "user", "content": "Why is the sky blue?"}]


# ---- prompts and parameters ----


def test_strings_chats_and_token_ids_are_answered_in_their_order(engine: TideEngine) -> None:
    outputs = engine.generate(["hello", CHAT, [7, 8, 9], "bye"], GREEDY)
    assert [output.prompt for output in outputs] == [
        "hello",
        "<|user|>Why is the sky blue?</s><|assistant|>",
        None,
        "bye",
    ]
    tokenizer = engine.tokenizer
    chat_ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    expected = [tokenizer("hello")["input_ids"], chat_ids, [7, 8, 9], tokenizer("bye")["input_ids"]]
    assert [output.prompt_token_ids for output in outputs] == expected
    assert tokens(outputs) == [tokens(engine.generate([ids], GREEDY))[0] for ids in expected]
    assert all(output.finished and not output.error for output in outputs)
    assert_idle(engine)


@pytest.mark.parametrize("prompt", ["hello", [7, 8, 9], (7, 8, 9), CHAT], ids=["string", "ids", "tuple", "chat"])
def test_one_prompt_needs_no_list(engine: TideEngine, prompt: object) -> None:
    alone, listed = engine.generate(prompt, GREEDY), engine.generate([prompt], GREEDY)
    assert len(alone) == len(listed) == 1
    assert tokens(alone) == tokens(listed)


def test_no_prompts_give_no_outputs(engine: TideEngine) -> None:
    steps = engine.stats.num_steps
    assert engine.generate([], GREEDY) == []
    assert engine.generate([], []) == []
    assert engine.stats.num_steps == steps


def test_each_prompt_may_have_its_own_parameters(engine: TideEngine) -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (3, 1, 7)]
    outputs = engine.generate([[5, 6], [5, 6], [5, 6]], params)
    assert [len(ids) for ids in tokens(outputs)] == [3, 1, 7]


@pytest.mark.parametrize("num_params", [0, 1, 3])
def test_a_list_of_parameters_must_have_one_for_each_prompt(engine: TideEngine, num_params: int) -> None:
    """An empty list once counted as "not given" and answered everything with the defaults."""
    with pytest.raises(UserError, match=f"sampling_params must be one or one for each of 2 prompts, got {num_params}"):
        engine.generate(["a", "b"], [GREEDY] * num_params)
    assert_idle(engine)


@pytest.mark.parametrize(
    "params", [{"temperature": 0}, [None], ["greedy"], 0.5], ids=["dict", "None in list", "string in list", "number"]
)
def test_parameters_of_another_type_are_refused_before_anything_is_queued(engine: TideEngine, params: object) -> None:
    with pytest.raises(UserError, match="sampling_params must"):
        engine.generate(["a"], params)
    assert_idle(engine)


# ---- what an output holds ----


def test_every_token_has_a_depth_and_a_time(engine: TideEngine, prompts: list[list[int]]) -> None:
    for output in engine.generate(prompts, GREEDY):
        completion = output.outputs[0]
        assert len(completion.token_ids) == GREEDY.max_tokens
        assert completion.exit_layers == [engine.num_layers] * GREEDY.max_tokens
        assert completion.mean_exit_layer == engine.num_layers
        assert len(completion.token_times_us) == GREEDY.max_tokens
        assert min(completion.token_times_us) > 0
        assert output.queue_time_us >= 0
        assert sum(completion.token_times_us) + output.queue_time_us <= output.total_time_us
        assert completion.text == engine.tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def test_times_show_who_waited_for_a_place(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=1)
    outputs = engine.generate([[5, 6], [5, 6], [5, 6]], GREEDY)
    queued = [output.queue_time_us for output in outputs]
    run = [sum(output.outputs[0].token_times_us) for output in outputs]
    assert queued[0] < run[0] <= queued[1] < queued[1] + run[1] <= queued[2]


def test_n_completions_of_one_prompt_differ_when_sampled_and_agree_when_greedy(engine: TideEngine) -> None:
    sampled = SamplingParams(n=3, seed=11, max_tokens=8, ignore_eos=True)
    output = engine.generate([5, 6, 7], sampled)[0]  # all three end in one launch, which once failed the batch
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 3
    alone = [SamplingParams(seed=11 + i, max_tokens=8, ignore_eos=True) for i in range(3)]
    assert [c.token_ids for c in output.outputs] == tokens(engine.generate([[5, 6, 7]] * 3, alone))
    same = engine.generate([5, 6, 7], SamplingParams(n=3, temperature=0, max_tokens=8, ignore_eos=True))[0]
    assert len({tuple(completion.token_ids) for completion in same.outputs}) == 1
    assert_idle(engine)


def test_more_completions_than_places_are_all_answered(make_engine: MakeEngine) -> None:
    engine = make_engine(max_num_seqs=2)
    output = engine.generate([5, 6], SamplingParams(n=5, seed=1, max_tokens=4, ignore_eos=True))[0]
    assert [len(completion.token_ids) for completion in output.outputs] == [4] * 5
    assert engine.stats.num_finished_requests == 1
    assert_idle(engine)


# ---- limits ----


@pytest.mark.parametrize("max_tokens", [1000, None])
@pytest.mark.parametrize("prompt_length", [90, 95])
def test_max_model_len_ends_an_answer_as_length(engine: TideEngine, prompt_length: int, max_tokens: int | None) -> None:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    completion = engine.generate(list(range(5, 5 + prompt_length)), params)[0].outputs[0]
    assert prompt_length + len(completion.token_ids) == engine.max_model_len == 96
    assert completion.finish_reason == "length"
    assert completion.stop_reason is None


# ---- what never changes an answer ----

SETTINGS = {
    "all resident": {"max_num_seqs": NUM_PROMPTS},
    "refill": {"max_num_seqs": 3},
    "one at a time": {"max_num_seqs": 1},
    "chunked prefill": {"max_num_seqs": 5, "max_num_batched_tokens": 3},
    "fewer rows than residents": {"max_num_seqs": 8, "max_num_batched_tokens": 2},
    "a row at a time": {"max_num_seqs": 8, "max_num_batched_tokens": 1},
    "big pages": {"max_num_seqs": 5, "page_size": 64},
    "tiny pages": {"max_num_seqs": 5, "page_size": 1},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_an_answer_depends_on_its_prompt_alone(
    make_engine: MakeEngine, prompts: list[list[int]], answers: list[list[int]], settings: dict[str, int]
) -> None:
    engine = make_engine(**settings)
    assert tokens(engine.generate(prompts, GREEDY)) == answers
    assert engine.stats.num_preemptions == 0
    assert_idle(engine)


def test_the_order_of_the_prompts_changes_no_answer(
    engine: TideEngine, prompts: list[list[int]], answers: list[list[int]]
) -> None:
    for seed in range(3):
        order = random.Random(seed).sample(range(NUM_PROMPTS), NUM_PROMPTS)
        outputs = engine.generate([prompts[i] for i in order], GREEDY)
        assert tokens(outputs) == [answers[i] for i in order]
    assert tokens([engine.generate([prompt], GREEDY)[0] for prompt in prompts]) == answers


@pytest.mark.parametrize("rows", [2048, 7, 2])
@pytest.mark.parametrize("num_pages", [12, 14])
def test_a_preempted_sequence_answers_as_if_it_had_never_been(
    make_starved_engine: MakeEngine, prompts: list[list[int]], answers: list[list[int]], num_pages: int, rows: int
) -> None:
    engine = make_starved_engine(num_pages, max_model_len=48, max_num_seqs=8, max_num_batched_tokens=rows)
    assert engine.num_kv_pages == num_pages
    outputs = engine.generate(prompts, GREEDY)
    assert engine.stats.num_preemptions > 0
    assert tokens(outputs) == answers
    for output in outputs:
        completion = output.outputs[0]
        assert len(completion.exit_layers) == len(completion.token_times_us) == len(completion.token_ids)
        assert sum(completion.token_times_us) + output.queue_time_us <= output.total_time_us
    assert engine.stats.num_prompt_tokens == sum(map(len, prompts))
    assert engine.stats.num_generated_tokens == NUM_PROMPTS * GREEDY.max_tokens
    assert_idle(engine)


def test_a_prompt_preempted_before_its_first_token_is_counted_once(make_starved_engine: MakeEngine) -> None:
    """The second prompt is half prefilled when the first one needs its pages; it once counted as half as long again."""
    engine = make_starved_engine(8, max_model_len=32, max_num_seqs=2, max_num_batched_tokens=2)
    long = SamplingParams(temperature=0, max_tokens=28, ignore_eos=True)
    engine.add_request("first", [5, 6, 7], long)
    for _ in range(10):
        engine.step()
    engine.add_request("second", list(range(5, 20)), GREEDY)
    while engine.has_unfinished_requests():
        engine.step()
    assert engine.stats.num_preemptions > 0
    assert engine.stats.num_prompt_tokens == 3 + 15


# ---- counters ----


class LayerCounter:
    """Counts, by forward hooks, the rows that every layer of an engine is called with."""

    def __init__(self, engine: TideEngine) -> None:
        layers = engine.runner.adapter.running_layers
        self.rows = [0] * len(layers)
        self._handles = [layer.register_forward_hook(self._hook(i)) for i, layer in enumerate(layers)]

    def _hook(self, index: int) -> Callable[..., None]:
        def count(_module: object, args: tuple[torch.Tensor, ...], _output: object) -> None:
            self.rows[index] += args[0].shape[1]

        return count

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def test_rows_through_layer_are_what_the_layers_really_ran(make_engine: MakeEngine, prompts: list[list[int]]) -> None:
    engine = make_engine(max_num_batched_tokens=7)
    assert engine.stats.rows_through_layer == [0] * 4, "loading and checking must not count"
    counter = LayerCounter(engine)
    try:
        outputs = engine.generate(prompts, GREEDY)
    finally:
        counter.close()
    # Every prompt token and every generated token but the last goes through every layer once.
    expected = sum(len(prompt) + GREEDY.max_tokens - 1 for prompt in prompts)
    assert engine.stats.rows_through_layer == counter.rows == [expected] * 4
    assert engine.stats.num_prompt_tokens == sum(map(len, prompts))
    assert engine.stats.num_generated_tokens == NUM_PROMPTS * GREEDY.max_tokens
    assert engine.stats.sum_exit_layers == sum(sum(output.outputs[0].exit_layers) for output in outputs)
    assert engine.stats.num_finished_requests == NUM_PROMPTS
    assert engine.stats.launches == {"full": engine.stats.num_steps}


def test_recomputed_rows_are_counted_because_they_ran(
    make_starved_engine: MakeEngine, prompts: list[list[int]]
) -> None:
    engine = make_starved_engine(12, max_model_len=48, max_num_seqs=8)
    counter = LayerCounter(engine)
    try:
        engine.generate(prompts, GREEDY)
    finally:
        counter.close()
    assert engine.stats.rows_through_layer == counter.rows
    assert counter.rows[0] > sum(len(prompt) + GREEDY.max_tokens - 1 for prompt in prompts)


THREADS_SCRIPT = """
import sys
from pathlib import Path
import torch
from tide_ray import EngineConfig, SamplingParams, TideEngine
config = EngineConfig(device="cpu", dtype="float32", num_threads=1, max_num_seqs=2, max_model_len=64)
engine = TideEngine.from_pretrained(sys.argv[1], config)
engine.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True))
print(torch.get_num_threads())
"""


@pytest.mark.slow
def test_decoding_keeps_the_number_of_threads(tiny_llama_folder: Path) -> None:
    """Numba's first parallel launch set OpenMP's default, which is torch's, to all cores: actors that share a machine
    then fought for them, and a prefill launch of microseconds waited for milliseconds."""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "3"}
    script = [sys.executable, "-c", THREADS_SCRIPT, str(tiny_llama_folder)]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "1"


def test_describe_tells_what_runs(engine: TideEngine) -> None:
    facts = engine.describe()
    assert facts["num_layers"] == 4
    assert facts["policy"] == "full"
    assert facts["stages"] == [{"name": "full", "layers": [0, 1, 2, 3], "depth": 4}]
    assert (facts["dtype"], facts["device"]) == ("float32", "cpu")
    assert (facts["max_model_len"], facts["max_num_seqs"], facts["page_size"]) == (96, 4, 4)
    assert facts["model_fingerprint"] == engine.model.fingerprint
    assert facts["num_kv_pages"] == 4 * 96 // 4
