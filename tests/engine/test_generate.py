"""``generate`` and the ``add_request`` / ``step`` loop: shapes, order, limits, counters, and what never changes an answer."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from references import assert_idle, cycle_model, greedy, loaded, ragged_prompts
from tiny_models import TOKENIZER_VOCAB_SIZE, build_tiny_model

from tide_ray import EngineConfig, RequestOutput, SamplingParams, TideEngine, UserError
from tide_ray.models.load import LoadedModel

MakeEngine = Callable[..., TideEngine]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
CHAT = [{"role": "user", "content": "Why is the sky blue?"}]
NUM_PROMPTS = 10


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return ragged_prompts(NUM_PROMPTS, TOKENIZER_VOCAB_SIZE)


@pytest.fixture(scope="module")
def answers(prompts: list[list[int]]) -> list[list[int]]:
    """The greedy answer to each prompt, by the model's own forward."""
    model = build_tiny_model("llama", vocab_size=TOKENIZER_VOCAB_SIZE)
    return [greedy(model, prompt, GREEDY.max_tokens) for prompt in prompts]


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


@pytest.mark.parametrize("prompt_length", [90, 95])
def test_max_model_len_ends_an_answer_as_length(engine: TideEngine, prompt_length: int) -> None:
    params = SamplingParams(temperature=0, max_tokens=1000, ignore_eos=True)
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
        layers = engine.runner.adapter.layers
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


def test_describe_tells_what_runs(engine: TideEngine) -> None:
    facts = engine.describe()
    assert facts["num_layers"] == 4
    assert facts["policy"] == "full"
    assert facts["stages"] == [{"name": "full", "layers": [0, 1, 2, 3], "depth": 4}]
    assert (facts["dtype"], facts["device"]) == ("float32", "cpu")
    assert (facts["max_model_len"], facts["max_num_seqs"], facts["page_size"]) == (96, 4, 4)
    assert facts["model_fingerprint"] == engine.model.fingerprint
    assert facts["num_kv_pages"] == 4 * 96 // 4


# ---- interruptions ----


class Interrupt:
    """Raises from inside a layer of the engine, in the launch after ``num_launches`` more."""

    def __init__(self, engine: TideEngine, num_launches: int, error: type[BaseException]) -> None:
        self.num_left = num_launches
        self.error = error
        self.handle = engine.runner.adapter.layers[2].register_forward_pre_hook(self._count)

    def _count(self, _module: object, _args: object) -> None:
        self.num_left -= 1
        if self.num_left < 0:
            self.handle.remove()
            raise self.error("interrupted")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("num_launches", [0, 3, 14])
def test_an_interrupted_generate_leaves_the_engine_as_new(
    engine: TideEngine,
    prompts: list[list[int]],
    answers: list[list[int]],
    num_launches: int,
    error: type[BaseException],
) -> None:
    interrupt = Interrupt(engine, num_launches, error)
    with pytest.raises(error, match="interrupted"):
        engine.generate([*prompts, []], GREEDY)
    assert interrupt.num_left < 0
    assert_idle(engine)
    assert tokens(engine.generate(prompts, GREEDY)) == answers


def test_generate_interrupted_while_it_queues_prompts_leaves_the_engine_as_new(
    engine: TideEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests queued before the interrupt once stayed, and the next generate took their outputs for its own."""
    tokenize = type(engine.tokenizer).__call__

    def interrupted(tokenizer: object, text: str, *args: object, **kwargs: object) -> object:
        if text == "third":
            raise KeyboardInterrupt
        return tokenize(tokenizer, text, *args, **kwargs)

    monkeypatch.setattr(type(engine.tokenizer), "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(["first", [-1], "third"], GREEDY)
    monkeypatch.undo()
    assert_idle(engine)
    assert [output.error for output in engine.generate(["first", "second"], GREEDY)] == ["", ""]


def test_a_failed_launch_can_be_run_again(engine: TideEngine, prompts: list[list[int]], answers: list[list[int]]) -> None:
    """A caller with its own loop may retry ``step``: no token and no rejection is lost."""
    for number, prompt in enumerate(prompts):
        engine.add_request(f"request-{number}", prompt, GREEDY)
    engine.add_request("rejected", [], GREEDY)
    Interrupt(engine, 0, RuntimeError)
    with pytest.raises(RuntimeError, match="interrupted"):
        engine.step()
    done: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        done.update((output.request_id, output) for output in engine.step())
    assert done.pop("rejected").error
    assert [done[f"request-{i}"].outputs[0].token_ids for i in range(NUM_PROMPTS)] == answers
    assert_idle(engine)


# ---- several users of one engine, several engines ----


def test_requests_of_a_caller_are_not_swallowed_by_generate(
    engine: TideEngine, prompts: list[list[int]], answers: list[list[int]]
) -> None:
    """generate drives the same loop: it once dropped, and counted as its own, what others had queued."""
    engine.add_request("short", prompts[0], SamplingParams(temperature=0, max_tokens=1))
    engine.add_request("rejected", [], GREEDY)
    engine.add_request("mine", prompts[1], GREEDY)
    assert tokens(engine.generate(prompts[2:6], GREEDY)) == answers[2:6]
    returned: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        returned.update((output.request_id, output) for output in engine.step())
    assert set(returned) == {"short", "rejected", "mine"}
    assert returned["mine"].outputs[0].token_ids == answers[1]
    assert_idle(engine)


def test_aborting_frees_a_request_wherever_it_is(engine: TideEngine, prompts: list[list[int]]) -> None:
    for number, prompt in enumerate(prompts[:6]):
        engine.add_request(f"request-{number}", prompt, GREEDY)
    engine.step()
    engine.step()
    engine.abort("request-0")  # resident
    engine.abort("request-5")  # waiting
    engine.abort("request-5")
    engine.abort("unknown")
    finished = set()
    while engine.has_unfinished_requests():
        finished |= {output.request_id for output in engine.step()}
    assert finished == {f"request-{i}" for i in range(1, 5)}
    assert_idle(engine)


def test_a_running_request_id_cannot_be_used_again(engine: TideEngine) -> None:
    engine.add_request("same", [5, 6], GREEDY)
    with pytest.raises(UserError, match="request_id must be unique among running requests, got 'same'"):
        engine.add_request("same", [7, 8], GREEDY)
    engine.abort("same")
    assert_idle(engine)


def test_two_engines_take_turns_without_disturbing_each_other(engine: TideEngine, prompts: list[list[int]]) -> None:
    other = TideEngine(loaded(build_tiny_model("gemma2")), engine.config)
    short = [[token % 200 for token in prompt] for prompt in prompts[:4]]
    expected = [tokens(engine.generate(short, GREEDY)), tokens(other.generate(short, GREEDY))]
    for one in (engine, other):
        for number, prompt in enumerate(short):
            one.add_request(str(number), prompt, GREEDY)
    done: list[dict[str, list[int]]] = [{}, {}]
    while engine.has_unfinished_requests() or other.has_unfinished_requests():
        for result, one in zip(done, (engine, other), strict=True):
            result.update((output.request_id, output.outputs[0].token_ids) for output in one.step())
    assert [[result[str(i)] for i in range(4)] for result in done] == expected


@pytest.fixture(scope="module")
def shared_model() -> LoadedModel:
    return loaded(cycle_model())


def test_two_engines_may_share_one_loaded_model(shared_model: LoadedModel) -> None:
    """The second engine once failed, as the first had taken over the model's attention before it was probed."""
    config = {"max_num_seqs": 2, "max_model_len": 96}
    full = TideEngine(shared_model, EngineConfig(**config))
    static = TideEngine(shared_model, EngineConfig(**config, policy="static", exit_layer=1))
    for engine, depth in ((full, 4), (static, 1), (full, 4)):
        completion = engine.generate([10, 11, 12], GREEDY)[0].outputs[0]
        assert completion.exit_layers == [depth] * GREEDY.max_tokens
    assert full.stats.rows_through_layer[0] == full.stats.rows_through_layer[3]
    assert static.stats.rows_through_layer[1:] == [0, 0, 0]
