"""How a model calls its layers in one launch, and the same for some of the launch's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerCall:
    """How the model calls one layer, apart from the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def selected_calls(
    calls: list[LayerCall], index: Tensor, *, num_rows: int, cache: object, new_cache: object
) -> list[LayerCall]:
    """The calls of a launch for its rows ``index`` (long ``[n]``) alone, with ``new_cache`` in place of ``cache``.

    Tensors ``[1, num_rows, ...]`` are taken to be by row; see ``Adapter.calls_are_by_row``.
    """
    done: dict[int, Any] = {id(cache): new_cache}  # layers share most of what they are called with

    def select(value: Any) -> Any:
        if id(value) not in done:
            if isinstance(value, Tensor):
                is_by_row = value.ndim >= 2 and value.shape[:2] == (1, num_rows)
                done[id(value)] = value.index_select(1, index) if is_by_row else value
            elif isinstance(value, tuple):
                done[id(value)] = tuple(select(part) for part in value)
            else:
                return value
        return done[id(value)]

    return [
        LayerCall(tuple(map(select, call.args)), {name: select(value) for name, value in call.kwargs.items()})
        for call in calls
    ]


def are_alike(a: Any, b: Any) -> bool:
    """Whether two nested arguments hold equal tensors and otherwise the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(are_alike(a[key], b[key]) for key in a)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(are_alike, a, b))
    return a is b or (isinstance(a, bool | int | float | str) and a == b)
