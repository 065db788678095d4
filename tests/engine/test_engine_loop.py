"""One loop for everybody: interrupted and failed launches, aborts, and several callers or engines at a time."""

from __future__ import annotations

import pytest

from references import GREEDY, NUM_PROMPTS, Interrupt, assert_idle, cycle_model, loaded, tokens
from tide_ray import EngineConfig, RequestOutput, SamplingParams, TideEngine, UserError
from tide_ray.models.loading import LoadedModel
from tiny_models import build_tiny_model


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


def test_a_failed_launch_can_be_run_again(
    engine: TideEngine, prompts: list[list[int]], answers: list[list[int]]
) -> None:
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


def test_warming_up_leaves_no_trace(engine: TideEngine, prompts: list[list[int]], answers: list[list[int]]) -> None:
    engine.generate(prompts[0], GREEDY)
    shared = engine.runner.stats
    engine.warm_up()
    assert engine.stats is shared
    assert (engine.stats.num_steps, engine.stats.num_prompt_tokens, sum(engine.stats.rows_through_layer)) == (0, 0, 0)
    assert_idle(engine)
    assert tokens(engine.generate(prompts, GREEDY)) == answers


def test_an_engine_too_short_for_the_warm_up_prompt_warms_up_with_what_fits() -> None:
    engine = TideEngine(loaded(cycle_model()), EngineConfig(max_model_len=4, max_num_seqs=2))
    seen: list[int] = []
    first_layer = engine.runner.adapter.running_layers[0]
    first_layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape[-2]))
    engine.warm_up()
    assert seen == [2, 1]
    assert engine.stats.num_rejected_requests == 0
