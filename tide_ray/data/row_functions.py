"""What a pipeline's own functions make of rows before and after generation, by the contract of ray.data.llm."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from tide_ray.data.prompts import PROMPT_COLUMNS
from tide_ray.data.schema import ERROR_COLUMN

RowFunction = Callable[[dict[str, Any]], dict[str, Any]]


def with_request(preprocess: RowFunction) -> RowFunction:
    """Adds to a row what ``preprocess`` makes of it; a prompt of any kind takes the place of all that the row had.

    A row that an earlier step rejected stays as it is.
    """

    @wraps(preprocess, updated=())
    def add(row: dict[str, Any]) -> dict[str, Any]:
        if row.get(ERROR_COLUMN):
            return row
        made = preprocess(dict(row))
        named = [name for name in PROMPT_COLUMNS if name in made]
        # ``{**row, "prompt": ...}`` names what the row had as well.
        chosen = [name for name in named if made[name] is not row.get(name)] or named
        replaced = set(PROMPT_COLUMNS).difference(chosen) if chosen else set()
        return {name: value for name, value in {**row, **made}.items() if name not in replaced}

    return add


def unless_rejected(postprocess: RowFunction, *, adds_error: bool) -> RowFunction:
    """Rejected rows stay whole, as what ``postprocess`` looks for may be missing; the others have an empty error."""

    @wraps(postprocess, updated=())
    def finish(row: dict[str, Any]) -> dict[str, Any]:
        if row[ERROR_COLUMN]:
            return row
        made = postprocess(row)
        return {**made, ERROR_COLUMN: ""} if adds_error else made

    return finish
