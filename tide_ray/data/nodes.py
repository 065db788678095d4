"""The nodes of a cluster as Ray has them: which are wanted, by labels and accelerator type, and which one this is.

A process asks for labels by Ray's selectors: ``VALUE``, ``!VALUE``, ``in(A, B)`` or ``!in(A, B)``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tide_ray.types import UserError

ACCELERATOR_PREFIX = "accelerator_type:"
"""What Ray's resource of an accelerator type begins with; a node has 1 of it, who needs the type takes a thousandth."""
ACCELERATOR_SHARE = 0.001
_WORD = "[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL = re.compile(f"(?:{_WORD}/)?{_WORD}")
_SELECTOR = re.compile(rf"!?{_WORD}|!?in\({_WORD}(?:, ?{_WORD})*\)")


def check_labels(labels: Mapping[str, str]) -> None:
    """Refuse what Ray would refuse only once a task or an actor starts.

    Raises:
        UserError: a name that can be no label, or a condition that is none.
    """
    for label, condition in labels.items():
        if not _LABEL.fullmatch(label) or not _SELECTOR.fullmatch(condition):
            raise UserError(f"labels: expected NAME: VALUE, !VALUE or in(A, B), got {label!r}: {condition!r}")


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node's labels satisfy Ray's selector."""
    for name, condition in selector.items():
        values = re.findall(r"[\w.-]+", condition.removeprefix("!").removeprefix("in("))
        if (labels.get(name) in values) == condition.startswith("!"):
            return False
    return True


def live_nodes(
    nodes: Sequence[Mapping[str, Any]], labels: Mapping[str, str] | None = None, accelerator_type: str | None = None
) -> list[Mapping[str, float]]:
    """The resources of the live nodes in what ``ray.nodes()`` returns, of those alone that are wanted.

    Raises:
        UserError: no live node has these labels, or an accelerator of this type.
    """
    found = [node for node in nodes if node["Alive"]]
    if labels:
        found = [node for node in found if matches(node.get("Labels", {}), labels)]
        if not found:
            raise UserError(f"labels: no node has them, got {dict(labels)!r}")
    if accelerator_type is not None:
        there = {name for node in found for name in node["Resources"] if name.startswith(ACCELERATOR_PREFIX)}
        found = [node for node in found if ACCELERATOR_PREFIX + accelerator_type in node["Resources"]]
        if not found:
            types = ", ".join(sorted(name.removeprefix(ACCELERATOR_PREFIX) for name in there)) or "none"
            raise UserError(f"accelerator_type: no node has one, got {accelerator_type!r}; there are: {types}")
    return [node["Resources"] for node in found]


def this_node() -> Mapping[str, float]:
    """The resources of the node that this process of Ray runs on."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    return next(node["Resources"] for node in ray.nodes() if node["NodeID"] == own)
