"""What a pipeline's own functions make of rows before and after generation, by the contract of ray.data.llm."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from tide_ray.data.prompts import PROMPT_COLUMNS
from tide_ray.data.schema import ERROR_COLUMN

RowFunction = Callable[[dict[str, Any]], dict[str, Any]]


def with_request(preprocess: RowFunction) -> RowFunction:
    """Adds to a row what ``preprocess`` makes of it; a prompt of any kind takes the place of all that the row had."""

    @wraps(preprocess)
    def add(row: dict[str, Any]) -> dict[str, Any]:
        made = preprocess(row)
        replaced = PROMPT_COLUMNS if any(name in made for name in PROMPT_COLUMNS) else ()
        return {**{name: value for name, value in row.items() if name not in replaced}, **made}

    return add


def unless_rejected(postprocess: RowFunction, *, adds_error: bool) -> RowFunction:
    """Rejected rows stay whole, as what ``postprocess`` looks for may be missing; the others have an empty error."""

    @wraps(postprocess)
    def finish(row: dict[str, Any]) -> dict[str, Any]:
        if row[ERROR_COLUMN]:
            return row
        made = postprocess(row)
        return {**made, ERROR_COLUMN: ""} if adds_error else made

    return finish
