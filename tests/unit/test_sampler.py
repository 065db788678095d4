"""The sampler against HuggingFace's processors, and the promises that make a draw reproducible."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tide_ray.engine import sampler as sampler_module
from tide_ray.engine.draws import argmax, uniform
from tide_ray.engine.sampler import Sampler, SamplingRow, processed_probabilities
from tide_ray.types import SamplingParams

VOCAB = 3000
EOS_IDS = (2, 7)


def random_logits(num_rows: int, vocab_size: int = VOCAB, *, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def make_row(
    *,
    seed: int = 0,
    position: int = 0,
    token_ids: tuple[int, ...] = (),
    suppressed: tuple[int, ...] = (),
    **params: float | int | None,
) -> SamplingRow:
    return SamplingRow(SamplingParams(max_tokens=64, **params), seed, position, token_ids, suppressed)


def huggingface_probabilities(logits: torch.Tensor, row: SamplingRow) -> torch.Tensor:
    """One row [V] through transformers' own processors in the order of `generate`, in float64."""
    params, processors = row.params, LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    if row.suppressed:
        processors.append(MinNewTokensLengthLogitsProcessor(len(row.token_ids), 1, list(row.suppressed)))
    if params.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.top_k > 0:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        processors.append(MinPLogitsWarper(params.min_p))
    ids = torch.tensor([list(row.token_ids)], dtype=torch.int64)
    return processors(ids, logits[None].double())[0].softmax(dim=-1)


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Standard scores of the chi-square statistic; cells expected fewer than 5 times are pooled."""
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    freedom = len(wanted) - 1
    return float((statistic - freedom) / math.sqrt(2 * freedom))


GRID = [
    {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for temperature, top_k, top_p, min_p in itertools.product(
        (0.3, 1.0, 2.5), (0, 1, 5, 50, 1024, 2000, VOCAB + 5), (0.05, 0.6, 0.95, 1.0), (0.0, 0.02, 0.5)
    )
]


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_filtered_distributions_equal_huggingfaces_over_a_grid_of_parameters(scale: float) -> None:
    rows = [make_row(**params) for params in GRID]
    logits = random_logits(len(rows), scale=scale)
    ours = processed_probabilities(logits, rows)
    for r, row in enumerate(rows):
        theirs = huggingface_probabilities(logits[r], row)
        assert torch.equal(ours[r] > 0, theirs > 0), row.params
        torch.testing.assert_close(ours[r], theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("filters", [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_penalty_and_suppression_come_before_the_filters_as_in_huggingface(filters: dict[str, float]) -> None:
    logits = random_logits(12)
    rows = [
        make_row(
            temperature=0.7,
            repetition_penalty=penalty,
            token_ids=(*logits[r].topk(5).indices.tolist(), 11, 11, 5),
            suppressed=EOS_IDS if r % 2 else (),
            **filters,
        )
        for r, penalty in enumerate((0.5, 0.9, 1.0, 1.1, 1.5, 4.0) * 2)
    ]
    ours = processed_probabilities(logits, rows)
    for r, row in enumerate(rows):
        torch.testing.assert_close(ours[r], huggingface_probabilities(logits[r], row), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9},
        {"temperature": 1.2, "top_k": 40},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 1.5, "top_k": 100, "top_p": 0.7, "min_p": 0.01},
    ],
)
def test_twenty_thousand_draws_follow_the_processed_distribution(params: dict[str, float]) -> None:
    logits, num_draws, num_rows = random_logits(1, 400), 20_000, 500
    sampler, counts = Sampler(), np.zeros(400)
    for start in range(0, num_draws, num_rows):
        rows = [make_row(seed=1234, position=start + i, **params) for i in range(num_rows)]
        counts += np.bincount(sampler.sample(logits.expand(num_rows, -1), rows).token_ids, minlength=400)
    expected = processed_probabilities(logits, [make_row(**params)])[0].numpy() * num_draws
    assert counts[expected == 0].sum() == 0
    assert abs(chi_square(counts, expected)) < 4


def mixed_rows() -> list[SamplingRow]:
    variants: list[dict[str, float | int | None]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.0, "top_k": 500, "top_p": 0.99},
        {"temperature": 3.0, "top_p": 0.999},
        {"temperature": 1.0, "top_k": 2000},
        {"temperature": 1.0, "min_p": 0.2, "repetition_penalty": 1.3},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 1.0, "top_p": 0.5, "logprobs": 3},
    ]
    return [
        make_row(seed=17 * i, position=i % 5, token_ids=(1, 2, 3, i), suppressed=EOS_IDS if i % 3 else (), **variant)
        for i, variant in enumerate(variants * 4)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_draws_the_same_token_alone_and_in_a_mixed_batch(dtype: torch.dtype) -> None:
    rows = mixed_rows()
    logits = random_logits(len(rows)).to(dtype)
    sampler = Sampler()
    together = sampler.sample(logits, rows)
    backwards = sampler.sample(logits.flip(0), rows[::-1])
    assert backwards.token_ids[::-1] == together.token_ids
    for r, row in enumerate(rows):
        alone = sampler.sample(logits[r : r + 1], [row])
        assert alone.token_ids == together.token_ids[r : r + 1], row.params
        assert alone.logprobs == together.logprobs[r : r + 1]


def test_sampling_leaves_the_logits_unchanged() -> None:
    rows = mixed_rows()
    logits = random_logits(len(rows))
    before = logits.clone()
    Sampler().sample(logits, rows)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [1, 257, 300, 3000, 49152])
def test_greedy_is_argmax_and_the_first_of_equals(vocab_size: int, dtype: torch.dtype) -> None:
    logits = random_logits(9, vocab_size).to(dtype)
    logits[3, vocab_size // 3 :: max(1, vocab_size // 5)] = 50.0
    sampled = Sampler().sample(logits, [make_row(temperature=0.0)] * 9)
    assert sampled.token_ids == logits.argmax(dim=-1).tolist()
    assert sampled.logprobs == [None] * 9


@pytest.mark.parametrize("temperature", [1e-3, 1e-30])
def test_a_tiny_temperature_is_greedy_and_does_not_overflow(temperature: float) -> None:
    logits = random_logits(9, scale=50.0)
    rows = [make_row(temperature=temperature, position=i) for i in range(9)]
    assert Sampler().sample(logits, rows).token_ids == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_suppressed_ids_are_never_drawn(temperature: float) -> None:
    logits = torch.full((200, 8), -2.0)
    logits[:, 3] = 9.0
    rows = [make_row(temperature=temperature, position=i, suppressed=(3, 5)) for i in range(200)]
    assert not {3, 5} & set(Sampler().sample(logits, rows).token_ids)


def test_a_suppressed_id_outside_the_vocabulary_is_ignored() -> None:
    rows = [make_row(temperature=0.0, suppressed=(-1, VOCAB, 10**9))]
    logits = random_logits(1)
    assert Sampler().sample(logits, rows).token_ids == logits.argmax(dim=-1).tolist()


def test_a_top_k_beyond_the_vocabulary_keeps_everything() -> None:
    logits = random_logits(1, 50)
    unlimited = processed_probabilities(logits, [make_row()])
    assert torch.equal(processed_probabilities(logits, [make_row(top_k=10**6)]), unlimited)
    assert torch.equal(processed_probabilities(logits, [make_row(top_k=-1)]), unlimited)


def test_top_p_gives_the_same_whether_or_not_its_candidates_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(6, scale=2.0)
    rows = [make_row(top_p=p, top_k=k, seed=3) for p, k in itertools.product((0.1, 0.6, 0.97), (0, 300))]
    expected = processed_probabilities(logits, rows)
    tokens = Sampler().sample(logits, rows).token_ids
    monkeypatch.setattr(sampler_module, "FIRST_CANDIDATES", 4)
    monkeypatch.setattr(sampler_module, "MORE_CANDIDATES", 16)
    torch.testing.assert_close(processed_probabilities(logits, rows), expected, atol=1e-12, rtol=0)
    assert Sampler().sample(logits, rows).token_ids == tokens


def test_equally_likely_tokens_are_kept_together() -> None:
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0, -4.0, 1.0]])
    tied = torch.tensor([True, True, True, True, False, True])
    for params in ({"top_k": 2}, {"top_p": 0.7}, {"top_k": 3, "top_p": 0.8}):
        assert torch.equal(processed_probabilities(logits, [make_row(**params)])[0] > 0, tied), params


def test_ties_that_leave_the_candidates_do_not_change_the_mass_top_p_is_a_share_of() -> None:
    """top_p once took its share of the candidates' mass alone, without the tokens tied with the k-th among the rest."""
    logits = torch.tensor([[5.0] + [4.0] * 100 + [0.0] * 100])
    kept = processed_probabilities(logits, [make_row(top_k=2, top_p=0.03)])[0] > 0
    assert kept.tolist() == [True] * 101 + [False] * 100


@pytest.mark.parametrize("u", [0.0, 1.0 - 2.0**-53])
@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 4}, {"min_p": 0.1}])
def test_no_token_of_probability_zero_is_drawn_at_the_edges(
    u: float, params: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler_module, "uniform", lambda seeds, positions: np.full(len(seeds), u))
    logits = random_logits(40, 1000)
    logits[:, :3] = -torch.inf
    logits[:, -700:] = -torch.inf
    rows = [make_row(**params)] * 40
    probabilities = processed_probabilities(logits, rows)
    tokens = torch.tensor(Sampler().sample(logits, rows).token_ids)
    assert bool((probabilities.gather(1, tokens[:, None]) > 0).all())
    edge = (
        probabilities.gt(0).int().argmax(dim=1) if u == 0.0 else 999 - probabilities.flip(1).gt(0).int().argmax(dim=1)
    )
    assert torch.equal(tokens, edge)


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"top_k": 4}])
def test_a_row_of_nan_does_not_fail_its_batch(params: dict[str, float]) -> None:
    logits = random_logits(2, 300)
    good = Sampler().sample(logits, [make_row(**params)] * 2).token_ids[1]
    logits[0] = torch.nan
    tokens = Sampler().sample(logits, [make_row(**params)] * 2).token_ids
    assert 0 <= tokens[0] < 300
    assert tokens[1] == good


def test_uniforms_are_uniform_and_independent_across_seeds_and_positions() -> None:
    n = 300
    seeds, positions = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    draws = uniform(seeds.ravel().tolist(), positions.ravel().tolist()).reshape(n, n)
    assert 0 <= draws.min() < draws.max() < 1
    assert abs(draws.mean() - 0.5) < 4 / math.sqrt(12 * n * n)
    assert abs(draws.var() - 1 / 12) < 4 / math.sqrt(180 * n * n)
    counts = np.histogram(draws, bins=64, range=(0, 1))[0]
    assert abs(chi_square(counts, np.full(64, n * n / 64))) < 4
    neighbours = ((draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1]), (draws[1:, :-1], draws[:-1, 1:]))
    for left, right in neighbours:
        assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 4 / n


def test_a_uniform_depends_on_seed_and_position_only() -> None:
    assert uniform([5, -5, 2**63], [3, 0, 2**40])[0] == uniform([5], [3])[0]
    assert len(set(uniform([5, 5, 6, -5], [3, 4, 3, 3]).tolist())) == 4


def test_uniforms_stay_as_they_are_between_releases() -> None:
    """A change here changes what every seeded request returns."""
    assert uniform([0, 1, -1], [0, 0, 7]).tolist() == [0.6524484863740322, 0.36818951565166946, 0.7238582745899125]


def test_logprobs_are_of_the_unprocessed_logits_with_the_sampled_token_first() -> None:
    logits = random_logits(4, 100)
    rows = [
        make_row(temperature=5.0, top_k=3, repetition_penalty=2.0, token_ids=(1, 2), logprobs=5),
        make_row(temperature=1.0, logprobs=0, seed=4),
        make_row(temperature=0.0),
        make_row(temperature=0.0, logprobs=2),
    ]
    sampled = Sampler().sample(logits, rows)
    reference = logits.log_softmax(dim=-1)
    assert sampled.logprobs[2] is None
    for r, num_top in ((0, 5), (1, 0), (3, 2)):
        entries, token_id = sampled.logprobs[r], sampled.token_ids[r]
        assert entries is not None
        assert next(iter(entries)) == token_id
        assert set(entries) == {token_id, *reference[r].topk(num_top).indices.tolist()}
        for entry_id, entry in entries.items():
            assert entry.logprob == pytest.approx(reference[r, entry_id].item(), abs=1e-6)
            assert entry.rank == 1 + int((reference[r] > reference[r, entry_id]).sum())
            assert entry.decoded_token is None


def test_more_logprobs_than_tokens_return_the_whole_vocabulary() -> None:
    (entries,) = Sampler().sample(random_logits(1, 10), [make_row(logprobs=50)]).logprobs
    assert entries is not None
    assert sorted(entries) == list(range(10))


def test_the_argmax_of_no_rows_is_empty() -> None:
    """A replay in which nothing stops at a boundary has no choices to make there."""
    assert argmax(torch.zeros(0, 96)).shape == (0,)
    tied = torch.zeros(3, 96, dtype=torch.bfloat16)
    tied[1, [5, 64]], tied[2, 95] = 2.0, 1.0
    assert argmax(tied).tolist() == [0, 5, 95]
