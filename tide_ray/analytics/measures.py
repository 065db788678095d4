"""What one run's output says, as plain facts: counts, depths, times, errors.

A few passes over the files whatever their size; percentiles are taken from counts of equal times, which is exact.
Depth L, the model's number of layers, is no exit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from tide_ray.analytics import queries
from tide_ray.analytics.dataset import Analytics
from tide_ray.analytics.outputs import JobOutput
from tide_ray.analytics.savings import savings
from tide_ray.analytics.views import ROWS_SCHEMA, literal
from tide_ray.analytics.vocabulary import CLASSES
from tide_ray.types import UserError

NUM_INTERVALS = 60
"""Of the time that a run took, for rates and occupancy over time."""


def measure(analytics: Analytics, output: JobOutput, categories: Sequence[str] | None = None) -> dict[str, Any]:
    """Everything that a report says of one run. What the output does not tell is None or empty.

    Args:
        categories: columns kept from the input to tell depths by; None: those of few values.

    Raises:
        UserError: a category is no column of the output.
    """
    given = {"run": literal(output.name), "rows": rows_of(output.name)}

    def ask(query: str, **more: Any) -> list[dict[str, Any]]:
        return analytics.records(query.format(**given, **more))

    chosen = _categories(analytics, given["rows"], categories)
    totals = ask(queries.TOTALS)[0]
    by_token = ask(queries.BY_TOKEN)
    depths = _tokens_by_depth(by_token)
    engine = output.facts.get("engine") or {}
    num_layers = engine.get("num_layers") or max(depths, default=0)
    return {
        "name": output.name,
        "path": output.path,
        "is_finished": output.is_finished,
        "facts": output.facts,
        "num_layers": num_layers,
        "knows_num_layers": "num_layers" in engine,
        "totals": totals,
        "depths": depths,
        "by_position": _grouped(by_token, "bucket", _position_label),
        "by_class": _grouped([row for row in by_token if row["token_class"]], "token_class", str, CLASSES),
        "by_prompt_length": _grouped(ask(queries.BY_PROMPT_LENGTH), "bucket", _length_label),
        "by_category": {
            name: _grouped(ask(queries.BY_CATEGORY, column=queries.identifier(name)), "category", str)
            for name in chosen
        },
        "first_token": next(iter(ask(queries.percentiles(queries.FIRST_TIMES))), None),
        "token_times": ask(queries.percentiles(queries.LATER_TIMES)),
        "over_time": _over_time(ask, totals),
        "num_errors": ask(queries.NUM_ROWS_WITH_ERRORS)[0]["num_rows"],
        "errors": ask(queries.ERRORS),
        "slowest": ask(queries.SLOWEST),
        "savings": savings(output.facts, depths, num_layers),
    }


def sample(analytics: Analytics, output: JobOutput, num_rows: int, max_tokens: int) -> list[dict[str, Any]]:
    """Answers, the same whenever asked: ``pieces`` has the text and the depth of every token up to ``max_tokens``."""
    query = queries.SAMPLE.format(rows=rows_of(output.name), num_rows=num_rows, max_tokens=max_tokens)
    vocabulary = analytics.vocabulary(output.name)
    return [
        {**row, "pieces": list(zip(vocabulary.pieces(row["token_ids"]), row["depths"], strict=True))}
        for row in analytics.records(query)
    ]


def rows_of(run: str) -> str:
    """The rows of a run, as a table in SQL."""
    return f"(SELECT * FROM rows WHERE run = {literal(run)})"


def _categories(analytics: Analytics, rows: str, asked: Sequence[str] | None) -> Sequence[str]:
    """Columns kept from the input: those asked for, else those of at least two and of few values."""
    schema = analytics.arrow(f"SELECT * FROM {rows} LIMIT 0").schema
    kept = [column for column in schema if column.name not in ROWS_SCHEMA.names]
    if asked is not None:
        for name in asked:
            if name not in {column.name for column in kept}:
                known = ", ".join(column.name for column in kept) or "none"
                raise UserError(f"category: no column kept from the input, got {name!r}; there are: {known}")
        return asked
    plain = [c.name for c in kept if not pa.types.is_nested(c.type) and not pa.types.is_floating(c.type)]
    if not plain:
        return []
    counts = [f"approx_count_distinct({queries.identifier(name)}) AS c{n}" for n, name in enumerate(plain)]
    found = analytics.records(queries.NUM_VALUES.format(counts=", ".join(counts), rows=rows))[0]
    return [name for n, name in enumerate(plain) if 2 <= found[f"c{n}"] <= queries.MAX_CATEGORIES]


def _over_time(ask: Callable[..., list[dict[str, Any]]], totals: dict[str, Any]) -> dict[str, Any] | None:
    """Tokens per second and residents in NUM_INTERVALS equal intervals; None where rows do not say when they ended."""
    first_us, last_us = totals["first_us"], totals["last_us"]
    if first_us is None or last_us <= first_us:
        return None
    width_us = (last_us - first_us) / NUM_INTERVALS
    rows = ask(queries.OVER_TIME, first_us=first_us, width_us=f"{width_us!r}::DOUBLE", num=NUM_INTERVALS)
    found = {row["number"]: row for row in rows}
    none = {"tokens": 0.0, "residents": 0.0}
    intervals = [found.get(number, none) for number in range(NUM_INTERVALS)]
    return {
        "seconds": (last_us - first_us) / 1e6,
        "tokens_per_second": [one["tokens"] / (width_us / 1e6) for one in intervals],
        "residents": [one["residents"] for one in intervals],
    }


def _tokens_by_depth(rows: Sequence[dict[str, Any]]) -> dict[int, int]:
    found: dict[int, int] = {}
    for row in rows:
        found[row["depth"]] = found.get(row["depth"], 0) + row["tokens"]
    return dict(sorted(found.items()))


def _grouped(
    rows: Sequence[dict[str, Any]], key: str, label: Callable[[Any], str], order: Sequence[Any] | None = None
) -> list[dict[str, Any]]:
    """``label`` and tokens by depth of every value of ``key``, in their order or in ``order``."""
    values = dict.fromkeys(row[key] for row in rows)
    return [
        {"label": label(value), "depths": _tokens_by_depth([row for row in rows if row[key] == value])}
        for value in (values if order is None else [one for one in order if one in values])
    ]


def _position_label(bucket: int) -> str:
    return str(bucket) if bucket <= 1 else _range(1 << (bucket - 1))


def _length_label(bucket: int) -> str:
    return "1" if bucket == 0 else _range(1 << bucket)


def _range(first: int) -> str:
    return f"{first:,}-{2 * first - 1:,}"
