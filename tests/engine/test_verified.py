"""Mode ``verified``: whatever is drafted, and however it is batched, answers are full depth's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from exit_helpers import NUM_LAYERS, forced_engine, make_routers
from references import Interrupt, assert_idle, forward_logits, greedy, loaded, ragged_prompts, tokens
from tide_ray import CompletionOutput, EngineConfig, RequestOutput, SamplingParams, TideEngine, UserError
from tide_ray.engine.speculation import MAX_DRAFTS
from tiny_models import TOKENIZER_VOCAB_SIZE, build_tiny_model, tiny_tokenizer

LENGTH = 14


def shallow_model(strength: float = 0.05) -> PreTrainedModel:
    """Layers past the second do little: what an identity reads from the state there is often right."""
    model = build_tiny_model("llama", vocab_size=TOKENIZER_VOCAB_SIZE)
    with torch.no_grad():
        for layer in list(model.model.layers)[2:]:
            layer.self_attn.o_proj.weight.mul_(strength)
            layer.mlp.down_proj.weight.mul_(strength)
    return model


def verified_engine(
    model: PreTrainedModel, shares: tuple[float, float] = (0.5, 0.6), *, is_identity: bool = True, **config: Any
) -> TideEngine:
    return forced_engine(model, (2, 3), shares, is_identity=is_identity, mode="verified", exits="given", **config)


def full_engine(model: PreTrainedModel, **config: Any) -> TideEngine:
    values = {"dtype": "float32", "device": "cpu", "page_size": 4, "max_model_len": 96, "max_num_seqs": 8, **config}
    return TideEngine(loaded(model, tiny_tokenizer()), EngineConfig(**values))


def answers(outputs: list[RequestOutput]) -> list[CompletionOutput]:
    return [completion for output in outputs for completion in output.outputs]


def content(outputs: list[RequestOutput]) -> list[tuple[Any, ...]]:
    """What a user sees of every answer."""
    return [(a.token_ids, a.text, a.finish_reason, a.stop_reason) for a in answers(outputs)]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """For engines, which take a model over."""
    return shallow_model()


@pytest.fixture(scope="module")
def plain() -> PreTrainedModel:
    """The same, for its own forward."""
    return shallow_model()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return ragged_prompts(128, TOKENIZER_VOCAB_SIZE, longest=24)


def greedy_params(number: int, **changes: Any) -> SamplingParams:
    """Ragged lengths; the seed decides who is made to draft."""
    return SamplingParams(
        **{"temperature": 0, "max_tokens": 3 + number % LENGTH, "ignore_eos": True, "seed": number, **changes}
    )


@pytest.fixture(scope="module")
def expected(model: PreTrainedModel, plain: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    params = [greedy_params(number) for number in range(len(prompts))]
    given = tokens(full_engine(model).generate(prompts, params))
    assert given[:8] == [greedy(plain, p, len(a)) for p, a in zip(prompts[:8], given[:8], strict=True)]
    return given


@pytest.mark.parametrize("is_identity", [True, False], ids=["good drafts", "wrong drafts"])
@pytest.mark.parametrize(
    "limits",
    [
        {"max_num_seqs": 3},
        {"max_num_seqs": 7, "max_num_batched_tokens": 11},
        {"max_num_seqs": 32, "holds": (3, 2)},
        {"max_num_seqs": 16, "holds": (1, 4), "compile": "off"},
        {"max_num_seqs": 64, "shares": (0.9, 0.95), "prefix_caching": False},
    ],
    ids=str,
)
def test_answers_are_full_depths_in_any_batch(
    model: PreTrainedModel,
    prompts: list[list[int]],
    expected: list[list[int]],
    limits: dict[str, Any],
    is_identity: bool,
) -> None:
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(len(limits))).tolist()
    engine = verified_engine(model, is_identity=is_identity, **limits)
    outputs = engine.generate([prompts[n] for n in order], [greedy_params(n) for n in order])
    assert_idle(engine)
    assert tokens(outputs) == [expected[n] for n in order]
    stats = engine.stats
    assert stats.num_rejected_drafts > 100
    assert stats.num_accepted_drafts > 300 if is_identity else stats.num_accepted_drafts < 100
    each = answers(outputs)
    assert stats.num_accepted_drafts == sum(answer.num_accepted_drafts for answer in each)
    assert stats.num_rejected_drafts == sum(answer.num_rejected_drafts for answer in each)
    assert {depth for answer in each for depth in answer.exit_layers} == {NUM_LAYERS}
    assert stats.num_generated_tokens == sum(len(answer.token_ids) for answer in each)
    assert all(len(a.token_times_us) == len(a.gate_scores) == len(a.token_ids) for a in each)


def test_positions_run_every_layer_once_and_wrong_drafts_beside_them(
    model: PreTrainedModel, prompts: list[list[int]]
) -> None:
    engine = verified_engine(model, prefix_caching=False)
    seen = [0] * NUM_LAYERS
    for layer, module in enumerate(engine.runner.adapter.running_layers):

        def count(_module: object, args: Any, kwargs: Any, layer: int = layer) -> None:
            seen[layer] += (args[0] if args else kwargs["hidden_states"]).shape[1]

        module.register_forward_pre_hook(count, with_kwargs=True)
    outputs = engine.generate(prompts[:32], [greedy_params(n) for n in range(32)])
    stats = engine.stats
    assert engine.stats.rows_through_layer == seen
    needed = sum(len(prompt) for prompt in prompts[:32]) + sum(len(a.token_ids) - 1 for a in answers(outputs))
    assert seen == [needed + stats.num_rejected_drafts] * NUM_LAYERS
    assert stats.num_rejected_drafts > 0


def test_a_chain_of_right_drafts_takes_one_deep_launch() -> None:
    model = shallow_model(0.0)
    engine = verified_engine(model, (1.0, 1.0), max_num_seqs=1)
    params = SamplingParams(temperature=0, max_tokens=2 + 3 * (MAX_DRAFTS + 1), ignore_eos=True)
    output = engine.generate([[5, 6, 7]], params)[0].outputs[0]
    assert output.token_ids == greedy(shallow_model(0.0), [5, 6, 7], params.max_tokens)
    assert (output.num_accepted_drafts, output.num_rejected_drafts) == (3 * MAX_DRAFTS, 0)
    # The prompt, three chains of full length, and the last token, which nobody drafts.
    assert engine.stats.launches["stage_2"] == 5


@pytest.mark.parametrize("holds", [(1, 1), (3, 2)])
def test_a_preempted_answer_loses_its_drafts_and_nothing_else(
    model: PreTrainedModel, prompts: list[list[int]], expected: list[list[int]], holds: tuple[int, int]
) -> None:
    engine = verified_engine(model, (0.8, 0.9), holds=holds, max_num_seqs=6, max_model_len=44)
    pool = engine.scheduler.pool
    taken = pool.allocate(pool.num_free - 14)
    outputs = engine.generate(prompts[:40], [greedy_params(number) for number in range(40)])
    assert engine.stats.num_preemptions > 0
    assert tokens(outputs) == expected[:40]
    assert taken is not None


@pytest.mark.parametrize("num_launches", [3, 9])
def test_a_failed_launch_can_be_run_again(
    model: PreTrainedModel, prompts: list[list[int]], expected: list[list[int]], num_launches: int
) -> None:
    engine = verified_engine(model, (0.8, 0.9), holds=(2, 2), max_num_seqs=6)
    for number, prompt in enumerate(prompts[:12]):
        engine.add_request(str(number), prompt, greedy_params(number))
    Interrupt(engine, num_launches, RuntimeError)
    done: dict[str, list[int]] = {}
    is_interrupted = False
    while engine.has_unfinished_requests():
        try:
            done |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
        except RuntimeError:
            is_interrupted = True
    assert is_interrupted
    assert [done[str(number)] for number in range(12)] == expected[:12]
    assert_idle(engine)


@pytest.mark.parametrize(
    "changes",
    [
        {"stop_token_ids": tuple(range(10, 70)), "ignore_eos": False},
        {"stop_token_ids": tuple(range(10, 70)), "min_tokens": 6},
        {"stop": ("a", "Z", "\x12", "~")},
        {"stop": ("a", "Z", "~"), "min_tokens": 4},
        {"repetition_penalty": 1.7},
        {"temperature": 1.5},
        {"temperature": 0.8, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 1.2, "top_k": 20, "repetition_penalty": 1.3, "stop_token_ids": tuple(range(10, 70))},
        {"temperature": 1.0, "n": 3},
    ],
    ids=str,
)
def test_stops_penalties_and_seeded_draws_are_full_depths(
    model: PreTrainedModel, prompts: list[list[int]], changes: dict[str, Any]
) -> None:
    """A stop that only a wrong draft shows does not end an answer, and with a seed draws are the same."""
    params = [greedy_params(number, max_tokens=8 + number % 7, **changes) for number in range(48)]
    wanted = content(full_engine(model).generate(prompts[:48], params))
    engine = verified_engine(model, max_num_seqs=12, holds=(2, 1), tokenizer=tiny_tokenizer())
    assert content(engine.generate(prompts[:48], params)) == wanted
    assert engine.stats.num_accepted_drafts > 10
    assert engine.stats.num_rejected_drafts > 10
    if "stop" in changes or "stop_token_ids" in changes:
        assert {"stop", "length"} <= {reason for _, _, reason, _ in wanted}
    assert_idle(engine)


def test_log_probabilities_are_of_full_depth(
    model: PreTrainedModel, plain: PreTrainedModel, prompts: list[list[int]]
) -> None:
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=3, seed=4)
    output = verified_engine(model).generate([prompts[0]], params)[0].outputs[0]
    assert output.num_accepted_drafts > 0
    assert output.logprobs is not None
    for n, (token, entries) in enumerate(zip(output.token_ids, output.logprobs, strict=True)):
        logits = forward_logits(plain, prompts[0] + output.token_ids[:n])[-1]
        assert entries[token].rank == 1
        assert entries[token].logprob == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-4)


def test_a_stream_shows_confirmed_tokens_only(model: PreTrainedModel, prompts: list[list[int]]) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, seed=3)
    engine = verified_engine(model, (0.8, 0.8), is_identity=False)
    wanted = tokens(full_engine(model).generate([prompts[1]], params))[0]
    shown = [output.outputs[0].token_ids for output in engine.stream(prompts[1], params)]
    assert engine.stats.num_rejected_drafts > 0
    assert all(ids == wanted[: len(ids)] for ids in shown)
    assert shown[-1] == wanted


def test_pages_of_confirmed_tokens_are_found_again(
    model: PreTrainedModel, plain: PreTrainedModel, prompts: list[list[int]]
) -> None:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, seed=2)
    engine = verified_engine(model)
    first = tokens(engine.generate([prompts[2]], params))[0]
    longer = prompts[2] + first
    output = engine.generate([longer], params)[0]
    assert engine.stats.num_rejected_drafts > 0
    assert output.num_cached_tokens >= len(prompts[2])
    assert output.outputs[0].token_ids == greedy(plain, longer, params.max_tokens)


def test_without_a_seed_draws_follow_full_depths_distribution() -> None:
    """Frequencies of pairs of tokens against their exact probabilities: the chi-squared statistic of the cells."""
    prompt, params = [9, 30, 77], SamplingParams(temperature=1.3, top_k=3, max_tokens=3, ignore_eos=True)
    engine, plain = verified_engine(shallow_model(0.4), (0.7, 1.0), max_num_seqs=64), shallow_model(0.4)
    counts: dict[tuple[int, ...], int] = {}
    for ids in tokens(engine.generate([prompt] * 4000, params)):
        counts[tuple(ids[:2])] = counts.get(tuple(ids[:2]), 0) + 1
    assert engine.stats.num_accepted_drafts > 1000
    assert engine.stats.num_rejected_drafts > 300
    total, statistic, mass = sum(counts.values()), 0.0, 0.0
    for first, at_first in next_tokens(plain, prompt, params).items():
        for second, at_second in next_tokens(plain, [*prompt, first], params).items():
            wanted = total * at_first * at_second
            statistic += (counts.pop((first, second), 0) - wanted) ** 2 / wanted
            mass += at_first * at_second
    assert not counts, "pairs that full depth never draws"
    assert mass == pytest.approx(1)
    assert statistic < 26.1, "the 99.9th percentile of chi-squared with 8 degrees of freedom"


def next_tokens(model: PreTrainedModel, prefix: list[int], params: SamplingParams) -> dict[int, float]:
    values, ids = (forward_logits(model, prefix)[-1] / params.temperature).topk(params.top_k)
    return dict(zip(ids.tolist(), values.softmax(-1).tolist(), strict=True))


def test_a_request_for_full_depth_drafts_nothing(
    model: PreTrainedModel, plain: PreTrainedModel, prompts: list[list[int]]
) -> None:
    engine = verified_engine(model)
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, exit_policy="full")
    outputs = engine.generate(prompts[:6], params)
    assert tokens(outputs) == [greedy(plain, prompt, 9) for prompt in prompts[:6]]
    assert engine.stats.num_accepted_drafts == engine.stats.num_rejected_drafts == 0


def test_gates_draft_and_any_checkpoint_will_do(
    model: PreTrainedModel, plain: PreTrainedModel, prompts: list[list[int]]
) -> None:
    """Thresholds and K/V policy of the checkpoint decide who drafts, not what is answered."""
    wrapped = loaded(model)
    routers = make_routers(wrapped, (2, 3), kv_policy="fitted", is_identity=True, bias=1.0)
    config = EngineConfig(
        dtype="float32", device="cpu", max_model_len=96, max_num_seqs=8, exits="given", mode="verified",
        exit_threshold=0.6, exits_when="always",
    )  # fmt: skip
    engine = TideEngine(wrapped, config, routers)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    outputs = engine.generate(prompts[:24], params)
    assert tokens(outputs) == [greedy(plain, prompt, 12) for prompt in prompts[:24]]
    assert engine.stats.num_accepted_drafts > 0
    facts = engine.describe()
    assert facts["mode"] == facts["exits"]["mode"] == "verified"
    assert facts["exits"]["kv_policy"] == "deferred"
    assert 0 < facts["exits"]["acceptance"] <= 1
    assert not facts["async_scheduling"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mode": "certain"}, "mode must be one of exits, verified, got 'certain'"),
        ({"mode": "verified"}, "mode needs exits, a router checkpoint, got 'verified'"),
        ({"mode": "verified", "exits": "r", "kv_policy": "fitted"}, "got kv_policy 'fitted'"),
        ({"mode": "verified", "exits": "r", "prefill_share": 0.5}, "got prefill_share 0.5"),
        ({"mode": "verified", "exits": "r", "max_disagreement": 0.5}, "got max_disagreement 0.5"),
        ({"mode": "verified", "exits": "r", "policy": "posthoc"}, "got policy 'posthoc'"),
    ],
)
def test_settings_that_verified_mode_cannot_keep_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EngineConfig(**values)
