"""Every bad value of EngineConfig is a one-line UserError that names the field and the value."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from tide_ray.config import DTYPES, POLICIES, EngineConfig
from tide_ray.types import UserError

COUNTS = ("max_num_seqs", "max_model_len", "max_num_batched_tokens", "page_size", "num_threads")


def error_of(**values: Any) -> str:
    with pytest.raises(UserError) as caught:
        EngineConfig(**values)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_defaults_are_valid_and_frozen() -> None:
    config = EngineConfig()
    assert (config.dtype, config.device, config.policy) == ("auto", "auto", "auto")
    assert config.resolved_policy == "full"
    assert EngineConfig(exits="routers").resolved_policy == "router"
    assert config.selfcheck
    assert config.prefix_caching
    assert not config.trust_remote_code
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dtype = "float32"


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_accepted(dtype: str) -> None:
    assert EngineConfig(dtype=dtype).dtype == dtype


@pytest.mark.parametrize("value", ["fp16", "", "FLOAT32", None])
def test_an_unknown_dtype_is_refused(value: Any) -> None:
    assert error_of(dtype=value) == f"dtype must be one of auto, float32, bfloat16, float16, got {value!r}"


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -1, 2.0, "8", True, math.inf])
def test_counts_must_be_positive_integers(name: str, value: Any) -> None:
    assert error_of(**{name: value}) == f"{name} must be a positive integer, got {value!r}"


@pytest.mark.parametrize("name", ["max_num_seqs", "max_model_len", "num_threads"])
def test_counts_that_are_planned_may_be_none(name: str) -> None:
    assert getattr(EngineConfig(**{name: None}), name) is None


@pytest.mark.parametrize("name", ["max_num_batched_tokens", "page_size"])
def test_counts_that_are_not_planned_may_not_be_none(name: str) -> None:
    assert error_of(**{name: None}) == f"{name} must be a positive integer, got None"


@pytest.mark.parametrize("value", [0, -0.5, 1.1, math.nan, math.inf, "0.5", None, True])
def test_the_share_of_memory_must_be_a_number_in_its_range(value: Any) -> None:
    assert error_of(kv_memory_fraction=value) == f"kv_memory_fraction must be in (0, 1], got {value!r}"


@pytest.mark.parametrize("value", ["0", 1.5, None, True])
def test_the_seed_must_be_an_integer(value: Any) -> None:
    assert error_of(seed=value) == f"seed must be an integer, got {value!r}"


@pytest.mark.parametrize("name", ["trust_remote_code", "prefix_caching", "selfcheck"])
@pytest.mark.parametrize("value", ["false", 0, None])
def test_switches_must_be_booleans(name: str, value: Any) -> None:
    """The string "false" (from a configuration file, say) is true in Python, and would run a stranger's code."""
    assert error_of(**{name: value}) == f"{name} must be true or false, got {value!r}"


# ---- policies ----


@pytest.mark.parametrize("value", ["routers", "", None, ["full"]])
def test_an_unknown_policy_is_refused(value: Any) -> None:
    assert error_of(policy=value) == f"policy must be one of {', '.join(POLICIES)}, got {value!r}"


@pytest.mark.parametrize("option", [{"exit_layer": 4}, {"skip_layers": (1, 2)}, {"static_cost": 0.5}])
def test_static_takes_exactly_one_option_and_full_takes_none(option: dict[str, Any]) -> None:
    (name,) = option
    assert EngineConfig(policy="static", **option).policy == "static"
    assert error_of(**option) == f"{name} needs policy 'static', got policy 'auto'"


def test_static_without_or_with_several_options_is_refused() -> None:
    needs = "policy 'static' needs exactly one of exit_layer, skip_layers, static_cost; got "
    assert error_of(policy="static") == needs + "none"
    assert error_of(policy="static", exit_layer=3, static_cost=0.5) == needs + "exit_layer, static_cost"
    assert error_of(policy="static", exit_layer=3, skip_layers=(1,)) == needs + "exit_layer, skip_layers"


@pytest.mark.parametrize("value", [0, -0.1, 1.5, math.nan, "0.5", True])
def test_static_cost_must_be_a_number_in_its_range(value: Any) -> None:
    assert error_of(policy="static", static_cost=value) == f"static_cost must be in (0, 1], got {value!r}"


@pytest.mark.parametrize("value", [2.0, "2", True])
def test_exit_layer_must_be_an_integer(value: Any) -> None:
    """It once was a TypeError deep inside the engine; the model's number of layers is checked there."""
    assert error_of(policy="static", exit_layer=value) == f"exit_layer must be an integer, got {value!r}"


@pytest.mark.parametrize("value", [3, "12", (1, "2"), (1, 2.0), (True,)])
def test_skip_layers_must_be_a_list_of_layer_numbers(value: Any) -> None:
    assert error_of(policy="static", skip_layers=value) == f"skip_layers must be a list of layer numbers, got {value!r}"


# ---- exits ----


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"policy": "router"}, "policy 'router' needs exits, a router checkpoint"),
        ({"policy": "static", "exit_layer": 2, "exits": "r"}, "exits needs another policy than 'static', got 'r'"),
        ({"exits": "r", "capacity": 0.5}, "capacity goes with policy 'capacity', got 0.5 with policy 'auto'"),
        ({"exits": "r", "policy": "capacity"}, "capacity goes with policy 'capacity', got None with policy 'capacity'"),
        ({"exits": "r", "policy": "confidence"}, "policy 'confidence' needs exit_threshold, got none"),
        ({"exits": "r", "exit_threshold": 0.5, "exit_error": 0.01}, "exit_threshold and exit_error exclude each other"),
        ({"exits": "r", "exit_threshold": 1.5}, "exit_threshold must be in [0, 1], got 1.5"),
        ({"exits": "r", "prefill_share": 0}, "prefill_share must be in (0, 1], got 0"),
        ({"exits": "r", "exit_min_depth": -1}, "exit_min_depth must be an integer of at least 0, got -1"),
        ({"exits": "r", "kv_policy": "zero"}, "kv_policy must be one of fitted, copy, deferred, full, got 'zero'"),
        ({"exits": "r", "exits_when": "never"}, "exits_when must be one of pays, always, got 'never'"),
        ({"compile": "on"}, "compile must be one of auto, off, got 'on'"),
        ({"cuda_graphs": True}, "cuda_graphs must be one of auto, off, got True"),
        ({"async_scheduling": "yes"}, "async_scheduling must be one of auto, on, off, got 'yes'"),
        ({"prefill_share": 0.5}, "prefill_share needs exits, a router checkpoint, got 0.5"),
        ({"exit_threshold": 0.5}, "exit_threshold needs exits, a router checkpoint, got 0.5"),
    ],
)
def test_settings_of_exits_that_do_not_go_together_are_refused(values: dict[str, Any], message: str) -> None:
    assert error_of(**values).startswith(message)
