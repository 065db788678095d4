"""Sampled requests: reproducible by seed in any company, distributed as the model says, with true log probabilities."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from references import assert_idle, forward_logits, greedy, ragged_prompts
from tide_ray import SamplingParams, TideEngine
from tide_ray.engine.sampler import SamplingRow, processed_probabilities
from tiny_models import TOKENIZER_VOCAB_SIZE, build_tiny_model

MakeEngine = Callable[..., TideEngine]
NUM_PROMPTS = 9
VARIANTS = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 20},
    {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.2},
    {"temperature": 0.0},
    {"temperature": 1.0, "min_tokens": 9},
)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return ragged_prompts(NUM_PROMPTS, TOKENIZER_VOCAB_SIZE, longest=20)


@pytest.fixture(scope="module")
def params() -> list[SamplingParams]:
    return [SamplingParams(seed=100 + i, max_tokens=10, **VARIANTS[i % len(VARIANTS)]) for i in range(NUM_PROMPTS)]


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return build_tiny_model("llama", vocab_size=TOKENIZER_VOCAB_SIZE)


@pytest.fixture(scope="module")
def alone(engine: TideEngine, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    """Each request on its own."""
    return [engine.generate(*request)[0].outputs[0].token_ids for request in zip(prompts, params, strict=True)]


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_seqs": NUM_PROMPTS},
        {"max_num_seqs": 2},
        {"max_num_seqs": 5, "max_num_batched_tokens": 3},
        {"max_num_seqs": 4, "seed": 99},
    ],
    ids=["all resident", "refill", "chunked prefill", "another base seed"],
)
def test_a_seeded_request_gets_the_same_tokens_in_any_company(
    make_engine: MakeEngine,
    prompts: list[list[int]],
    params: list[SamplingParams],
    alone: list[list[int]],
    settings: dict[str, int],
) -> None:
    engine = make_engine(**settings)
    order = random.Random(5).sample(range(NUM_PROMPTS), NUM_PROMPTS)
    outputs = engine.generate([prompts[i] for i in order], [params[i] for i in order])
    assert [output.outputs[0].token_ids for output in outputs] == [alone[i] for i in order]


def test_a_seeded_request_survives_preemption(
    make_starved_engine: MakeEngine, prompts: list[list[int]], params: list[SamplingParams], alone: list[list[int]]
) -> None:
    engine = make_starved_engine(9, max_model_len=32, max_num_seqs=6)
    outputs = engine.generate(prompts, params)
    assert engine.stats.num_preemptions > 0
    assert [output.outputs[0].token_ids for output in outputs] == alone
    assert_idle(engine)


def test_other_seeds_give_other_tokens(engine: TideEngine) -> None:
    params = [SamplingParams(seed=seed, max_tokens=10, ignore_eos=True) for seed in range(20)]
    outputs = engine.generate([[5, 6, 7]] * 20, params)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 20


def test_requests_without_a_seed_differ_and_repeat_with_the_engines_seed(make_engine: MakeEngine) -> None:
    runs = []
    for seed in (0, 0, 1):
        outputs = make_engine(seed=seed).generate([[5, 6, 7]] * 4, SamplingParams(max_tokens=10, ignore_eos=True))
        runs.append([tuple(output.outputs[0].token_ids) for output in outputs])
        assert len(set(runs[-1])) == 4
    assert runs[0] == runs[1]
    assert not set(runs[0]) & set(runs[2])


def test_no_two_completions_without_a_seed_are_drawn_alike(make_engine: MakeEngine) -> None:
    """A request's second completion had the seed of the next request's first, so both were the same answer."""
    params = SamplingParams(max_tokens=10, ignore_eos=True, n=3)
    outputs = make_engine().generate([[5, 6, 7]] * 4, params)
    answers = [tuple(completion.token_ids) for output in outputs for completion in output.outputs]
    assert len(set(answers)) == len(answers) == 12


def test_a_seed_changes_nothing_at_temperature_zero(engine: TideEngine, reference: PreTrainedModel) -> None:
    params = [SamplingParams(temperature=0, seed=seed, max_tokens=8, ignore_eos=True) for seed in (1, 2)]
    outputs = engine.generate([[5, 6, 7]] * 2, params)
    assert [output.outputs[0].token_ids for output in outputs] == [greedy(reference, [5, 6, 7], 8)] * 2


@pytest.mark.parametrize("variant", [{"temperature": 2.0}, {"temperature": 2.5, "top_p": 0.8, "top_k": 60}])
def test_first_tokens_over_many_seeds_follow_the_models_distribution(
    make_engine: MakeEngine, reference: PreTrainedModel, variant: dict[str, float]
) -> None:
    num, prompt = 3000, [5, 6, 7]
    engine = make_engine(max_num_seqs=256)
    params = [SamplingParams(seed=seed, max_tokens=1, **variant) for seed in range(num)]
    counts = torch.zeros(TOKENIZER_VOCAB_SIZE, dtype=torch.float64)
    for output in engine.generate([prompt] * num, params):
        counts[output.outputs[0].token_ids[0]] += 1
    row = SamplingRow(SamplingParams(**variant), 0, 0, ())
    expected = num * processed_probabilities(forward_logits(reference, prompt)[-1:], [row])[0]
    assert counts[expected == 0].sum() == 0
    is_common = expected >= 5
    assert is_common.sum() > 10
    pairs = torch.stack([counts, expected])
    observed, wanted = torch.cat([pairs[:, is_common], pairs[:, ~is_common].sum(dim=1, keepdim=True)], dim=1)
    statistic = ((observed - wanted) ** 2 / wanted.clamp_min(1e-9)).sum().item()
    freedom = len(wanted) - 1
    assert abs(statistic - freedom) / math.sqrt(2 * freedom) < 4


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_logprobs_are_those_of_the_models_forward(
    engine: TideEngine, reference: PreTrainedModel, prompts: list[list[int]], temperature: float
) -> None:
    num_top = 4
    params = SamplingParams(
        temperature=temperature, top_k=30, repetition_penalty=1.3, seed=8, logprobs=num_top, max_tokens=6
    )
    for prompt, output in zip(prompts, engine.generate(prompts, params), strict=True):
        completion = output.outputs[0]
        assert completion.logprobs is not None
        assert len(completion.logprobs) == len(completion.token_ids)
        logits = forward_logits(reference, prompt + completion.token_ids)
        expected = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
        for entries, row, chosen in zip(completion.logprobs, expected, completion.token_ids, strict=True):
            top = row.topk(num_top).indices.tolist()
            assert set(entries) == {chosen, *top}
            for token, entry in entries.items():
                assert entry.logprob == pytest.approx(row[token].item(), abs=1e-3)
                assert entry.rank == 1 + int((row > row[token]).sum())
                assert entry.decoded_token == engine.tokenizer.decode([token])


def test_logprobs_zero_returns_the_chosen_token_alone_and_none_returns_none(engine: TideEngine) -> None:
    with_zero, without = (SamplingParams(temperature=0, max_tokens=3, logprobs=number) for number in (0, None))
    outputs = engine.generate([[5, 6, 7]] * 2, [with_zero, without])
    completion = outputs[0].outputs[0]
    assert [list(entries) for entries in completion.logprobs or []] == [[token] for token in completion.token_ids]
    assert outputs[1].outputs[0].logprobs is None


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_greedy_with_a_repetition_penalty_equals_hf_generate(
    engine: TideEngine, reference: PreTrainedModel, prompts: list[list[int]], penalty: float
) -> None:
    params = SamplingParams(temperature=0, repetition_penalty=penalty, max_tokens=12)
    for prompt, output in zip(prompts, engine.generate(prompts, params), strict=True):
        ids = torch.tensor([prompt])
        expected = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            repetition_penalty=penalty,
        )
        assert output.outputs[0].token_ids == expected[0, len(prompt) :].tolist()
