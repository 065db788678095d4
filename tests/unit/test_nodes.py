"""Which nodes of a cluster are wanted, by Ray's labels and accelerator types."""

from __future__ import annotations

from typing import Any

import pytest
from ray._private.label_utils import validate_label_selector

from tide_ray.cli.options import labels
from tide_ray.data.nodes import check_labels, live_nodes, matches
from tide_ray.types import UserError

A100 = {"CPU": 8.0, "GPU": 4.0, "accelerator_type:A100": 1.0}
T4 = {"CPU": 4.0, "GPU": 1.0, "accelerator_type:T4": 1.0}
NODES: list[dict[str, Any]] = [
    {"Alive": True, "Resources": {"CPU": 2.0}},
    {"Alive": True, "Resources": A100, "Labels": {"zone": "a"}},
    {"Alive": True, "Resources": T4, "Labels": {"zone": "b"}},
    {"Alive": False, "Resources": A100, "Labels": {"zone": "gone"}},
]


@pytest.mark.parametrize(
    ("condition", "is_match"),
    [("a", True), ("b", False), ("!a", False), ("!b", True), ("in(b, a)", True), ("in(b)", False), ("!in(b,c)", True)],
)
def test_label_selectors_are_rays(condition: str, is_match: bool) -> None:
    assert matches({"zone": "a"}, {"zone": condition}) == is_match
    assert validate_label_selector({"zone": condition}) is None


@pytest.mark.parametrize("given", [{"zone": "b c"}, {"zone": "in()"}, {"zone": "a" * 64}, {"a/b/c": "x"}, {"-a": "x"}])
def test_what_ray_would_refuse_later_is_refused_at_once(given: dict[str, str]) -> None:
    assert validate_label_selector(given) is not None
    with pytest.raises(UserError, match="labels: expected NAME: VALUE"):
        check_labels(given)


def test_only_the_nodes_asked_for_are_planned_on() -> None:
    assert live_nodes(NODES) == [{"CPU": 2.0}, A100, T4]
    assert live_nodes(NODES, {"zone": "in(a, b)"}) == [A100, T4]
    assert live_nodes(NODES, {"zone": "!a"}) == [{"CPU": 2.0}, T4]
    assert live_nodes(NODES, None, "T4") == [T4]
    assert live_nodes(NODES, {"zone": "in(a, b)"}, "A100") == [A100]


@pytest.mark.parametrize(
    ("chosen", "accelerator_type", "message"),
    [
        ({"zone": "gone"}, None, "labels: no node has them, got {'zone': 'gone'}"),
        ({}, "H100", "accelerator_type: no node has one, got 'H100'; there are: A100, T4"),
        ({"zone": "a"}, "T4", "accelerator_type: no node has one, got 'T4'; there are: A100"),
        ({"zone": "!in(a, b)"}, "T4", "accelerator_type: no node has one, got 'T4'; there are: none"),
    ],
)
def test_what_no_node_has_is_refused(chosen: dict[str, str], accelerator_type: str | None, message: str) -> None:
    with pytest.raises(UserError) as error:
        live_nodes(NODES, chosen, accelerator_type)
    assert str(error.value) == message


def test_labels_come_as_text() -> None:
    assert labels("zone=a, ray.io/accelerator-type=in(A100, H100),x=!in(b,c)") == {
        "zone": "a", "ray.io/accelerator-type": "in(A100, H100)", "x": "!in(b,c)",
    }  # fmt: skip
    with pytest.raises(UserError, match="got 'zone'"):
        labels("a=b,zone")
