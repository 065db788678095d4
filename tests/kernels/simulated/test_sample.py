from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tide_kernels.sample import SamplingRules, random_bits, sample_tokens, sample_tokens_reference


@pytest.fixture(autouse=True)
def _two_warps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tide_kernels.cuda.sample.SAMPLE_THREADS", 64)


def rules_for(num_rows: int, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0) -> SamplingRules:
    def every(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((num_rows,), value, dtype=dtype)

    seeds = torch.arange(num_rows) * 977 - seed
    positions = torch.arange(num_rows) % 7
    return SamplingRules(every(temperature), every(top_k, torch.int32), every(top_p), every(min_p), seeds, positions)


@pytest.mark.parametrize("width", [1, 75, 128])
def test_greedy_takes_the_first_of_the_largest(dtype, generator, width: int) -> None:
    logits = torch.randint(-5, 5, (3, width), generator=generator).to(dtype)
    assert torch.equal(sample_tokens(logits, rules_for(3)), logits.argmax(-1))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 9},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 2.0, "top_k": 40, "top_p": 0.7, "min_p": 0.1},
        {"temperature": 1.0, "top_k": 1000, "top_p": 1e-6},
    ],
    ids=str,
)
def test_draws_are_the_references(generator, options) -> None:
    logits = torch.randn(4, 200, generator=generator) * 2
    rules = rules_for(4, **options)
    assert torch.equal(sample_tokens(logits, rules), sample_tokens_reference(logits, rules))


def test_half_precision_rows_with_many_equal_tokens(generator) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        logits = torch.randint(-3, 3, (3, 136), generator=generator).to(dtype)
        rules = rules_for(3, temperature=1.0, top_k=20, top_p=0.9, seed=5)
        assert torch.equal(sample_tokens(logits, rules), sample_tokens_reference(logits, rules))


def test_rows_mix_greedy_and_sampled_and_do_not_depend_on_each_other(generator) -> None:
    logits = torch.randn(3, 90, generator=generator)
    rules = rules_for(3, temperature=1.0, top_p=0.9)
    rules.temperatures[1] = 0
    together = sample_tokens(logits, rules)
    assert together[1] == logits[1].argmax()
    last = SamplingRules(*(getattr(rules, name)[2:] for name in SamplingRules.__slots__))
    assert torch.equal(sample_tokens(logits[2:], last), together[2:])


def test_what_is_not_a_number_is_never_chosen_and_dead_rows_do_not_fail(generator) -> None:
    logits = torch.randn(4, 70, generator=generator)
    logits[0, :69] = float("nan")
    logits[1] = float("nan")
    logits[2] = float("-inf")
    logits[3, 7] = float("inf")
    for temperature in (0.0, 1.0):
        assert sample_tokens(logits, rules_for(4, temperature)).tolist() == [69, 0, 0, 7]
        assert sample_tokens_reference(logits, rules_for(4, temperature)).tolist() == [69, 0, 0, 7]


def test_a_tiny_temperature_is_greedy_and_rows_may_lie_apart(generator) -> None:
    wide = torch.randn(3, 160, generator=generator)
    logits = wide[:, :80]
    assert torch.equal(sample_tokens(logits, rules_for(3, temperature=1e-9)), logits.argmax(-1))


def test_no_rows_give_no_tokens() -> None:
    assert sample_tokens(torch.zeros(0, 5), rules_for(0)).shape == (0,)


def test_bits_are_as_published() -> None:
    """SplitMix64 of seed 1234567 begins so, in the generator's own counting; ours mixes the seed first."""
    state, golden = np.array([1234567], dtype=np.uint64), np.uint64(0x9E3779B97F4A7C15)
    from tide_kernels.sample import _mix64

    assert _mix64(state + golden).tolist() == [6457827717110365317]
    assert len(set(random_bits(np.arange(100, dtype=np.uint64), np.zeros(100, dtype=np.uint64)).tolist())) == 100


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[N, V\]"):
        sample_tokens(torch.zeros(5), rules_for(5))
    with pytest.raises(ValueError, match="temperatures must be float32"):
        sample_tokens(torch.zeros(2, 5), rules_for(3))
