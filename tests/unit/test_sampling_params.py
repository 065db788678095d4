"""Every bad sampling parameter is one line that names the field and the value."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from tide_ray.types import MAX_COMPLETIONS, MAX_LOGPROBS, SamplingParams, UserError

BAD_VALUES: list[tuple[str, Any]] = [
    ("temperature", -0.1),
    ("temperature", 100.5),
    ("temperature", "hot"),
    ("temperature", True),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", None),
    ("top_p", float("nan")),
    ("top_k", -2),
    ("top_k", 2.0),
    ("top_k", True),
    ("min_p", -0.01),
    ("min_p", 1.5),
    ("min_p", "0.1"),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", 101.0),
    ("repetition_penalty", float("nan")),
    ("max_tokens", 0),
    ("max_tokens", 1.5),
    ("min_tokens", -1),
    ("min_tokens", "1"),
    ("stop", [""]),
    ("stop", ""),
    ("stop", [3]),
    ("stop", 3),
    ("stop_token_ids", 7),
    ("stop_token_ids", "7"),
    ("stop_token_ids", ["7"]),
    ("stop_token_ids", [True]),
    ("ignore_eos", 1),
    ("ignore_eos", "false"),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("seed", 1.0),
    ("n", 0),
    ("n", MAX_COMPLETIONS + 1),
    ("n", None),
    ("logprobs", -1),
    ("logprobs", MAX_LOGPROBS + 1),
    ("logprobs", True),
]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_bad_value_is_one_line_that_names_field_and_value(name: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        SamplingParams(**{name: value})
    message = str(caught.value)
    culprit = value[0] if isinstance(value, list) else value
    assert message.startswith(f"{name} must ")
    assert message.endswith(f"got {culprit!r}")
    assert "\n" not in message


def test_min_tokens_beyond_max_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="min_tokens must be from 0 to max_tokens, got 9"):
        SamplingParams(max_tokens=8, min_tokens=9)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", 100),
        ("top_p", 1),
        ("top_k", -1),
        ("top_k", 10**9),
        ("min_p", 1),
        ("repetition_penalty", 0.5),
        ("max_tokens", 1),
        ("n", MAX_COMPLETIONS),
        ("logprobs", 0),
        ("logprobs", MAX_LOGPROBS),
        ("seed", -(2**63)),
        ("seed", 2**63 - 1),
    ],
)
def test_the_ends_of_a_range_belong_to_it(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


def test_stop_takes_a_string_a_list_or_none_and_keeps_a_tuple() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop=None).stop == ()
    assert SamplingParams(stop_token_ids=[3, 4]).stop_token_ids == (3, 4)
    assert SamplingParams(stop_token_ids=None).stop_token_ids == ()


def test_a_user_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        SamplingParams(max_tokens=0)


def test_a_misspelt_name_in_a_mapping_is_refused_with_the_known_names() -> None:
    with pytest.raises(UserError, match=r"unknown parameter 'max_token'; known: .*max_tokens"):
        SamplingParams.from_mapping({"max_token": 3})
    assert SamplingParams.from_mapping({"max_tokens": 3, "temperature": 0.0}).is_greedy


def test_max_tokens_may_be_whatever_there_is_room_for() -> None:
    assert SamplingParams(max_tokens=None, min_tokens=99).most_tokens(room=100) == 100
    assert SamplingParams(max_tokens=7).most_tokens(room=100) == 7
    assert SamplingParams(max_tokens=700).most_tokens(room=100) == 100


def test_names_of_vllm_that_change_nothing_may_stand_there() -> None:
    """The example of ray.data.llm's own documentation has ``detokenize=False``."""
    asked = {"temperature": 0.3, "max_tokens": 20, "detokenize": False, "presence_penalty": 0.0, "stop": ["."]}
    assert SamplingParams.from_mapping(asked) == SamplingParams(temperature=0.3, max_tokens=20, stop=(".",))
    with pytest.raises(UserError, match="unknown parameter 'presence_penalty'"):
        SamplingParams.from_mapping({"presence_penalty": 0.5})


def test_params_cannot_be_changed_after_the_checks() -> None:
    params = SamplingParams()
    with pytest.raises(FrozenInstanceError):
        params.max_tokens = 0
