"""Two runs over the same prompts, side by side: what differs, where answers part, and whether it may be chance.

The unit is the prompt: rows of both runs with the same ``row_id`` are a pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tide_ray.analytics.dataset import Analytics
from tide_ray.analytics.measures import rows_of
from tide_ray.calibrate.intervals import interval, score_interval, sign_flip_p_value

MAX_PAIRS = 5000
"""Prompts that intervals and p-values are taken from; of more, as many drawn by a hash of their ids."""
CONDITIONS = ("model_identity", "sampling", "max_model_len", "input_sha256", "num_actors")
ENGINE_CONDITIONS = ("device", "dtype", "max_num_seqs", "num_threads")

MEASURES = {
    "depth of a token": "mean_exit_layer",
    "tokens of an answer": "num_generated_tokens",
    "ms to the first token": "token_times_us[1] / 1e3",
    "ms per later token": "list_sum(token_times_us[2:]) / nullif(len(token_times_us) - 1, 0) / 1e3",
    "ms in all": "total_time_us / 1e3",
}
"""What is compared by prompt, and how a row says it."""

_PAIRS = "FROM {a} AS a JOIN {b} AS b USING (row_id)"
_SAME = f"""
SELECT count(*) AS pairs, count(*) FILTER (a.generated_tokens = b.generated_tokens) AS same {_PAIRS}
"""
_PARTINGS = f"""
SELECT position, count(*) AS answers FROM (
    SELECT coalesce(list_position(list_transform(list_zip(a.generated_tokens, b.generated_tokens, true),
                                                 lambda x: x[1] <> x[2]), true) - 1,
                    least(len(a.generated_tokens), len(b.generated_tokens))) AS position
    {_PAIRS} WHERE a.generated_tokens <> b.generated_tokens
) GROUP BY position ORDER BY position
"""
"""Where the first token differs, or where the shorter answer ends."""
_VALUES = f"SELECT {{columns}} {_PAIRS} ORDER BY hash(row_id), row_id LIMIT {MAX_PAIRS}"


def compare(analytics: Analytics, first: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What ``other`` changes against ``first``, both from ``measures.measure``."""
    given = {"a": rows_of(first["name"]), "b": rows_of(other["name"])}
    counts = analytics.records(_SAME.format(**given))[0]
    pairs = counts["pairs"]
    facts: dict[str, Any] = {
        "first": first["name"],
        "other": other["name"],
        "pairs": pairs,
        "only_first": first["totals"]["num_rows"] - pairs,
        "only_other": other["totals"]["num_rows"] - pairs,
        "conditions": _differing(first["facts"], other["facts"]),
        "speed": _speed(first, other),
        "same": None,
        "partings": [],
        "measures": [],
    }
    if pairs:
        facts["same"] = score_interval(counts["same"], pairs)
        facts["partings"] = analytics.records(_PARTINGS.format(**given))
        facts["measures"] = _measures(analytics, given)
    return facts


def median_parting(partings: list[dict[str, Any]]) -> int | None:
    """The position that half of the answers that part have parted by; None when none does."""
    half = sum(row["answers"] for row in partings) / 2
    upto = 0
    for row in partings:
        upto += row["answers"]
        if upto >= half:
            return int(row["position"])
    return None


def _measures(analytics: Analytics, given: Mapping[str, str]) -> list[dict[str, Any]]:
    values_of_a_row = ", ".join(f"{value} AS m{number}" for number, value in enumerate(MEASURES.values()))
    sides = {side: f"(SELECT row_id, {values_of_a_row} FROM {rows})" for side, rows in given.items()}
    columns = [f"{side}.m{number} AS {side}{number}" for number in range(len(MEASURES)) for side in sides]
    values = analytics.arrow(_VALUES.format(columns=", ".join(columns), **sides)).to_pydict()
    found = []
    for number, name in enumerate(MEASURES):
        both = zip(values[f"a{number}"], values[f"b{number}"], strict=True)
        pairs = [(float(a), float(b)) for a, b in both if a is not None and b is not None]
        if not pairs:
            continue
        differences = [b - a for a, b in pairs]
        found.append(
            {
                "name": name,
                "pairs": len(pairs),
                "first": sum(a for a, _ in pairs) / len(pairs),
                "other": sum(b for _, b in pairs) / len(pairs),
                "difference": interval(differences),
                "p_value": sign_flip_p_value(differences),
            }
        )
    return found


def _speed(first: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any] | None:
    """Tokens per second over the first run's; where one of the two ran at full depth, what the other realised."""
    rates = [run["facts"].get("tokens_per_second") for run in (first, other)]
    if not all(rates):
        return None
    ratio = rates[1] / rates[0]
    facts = {"first": rates[0], "other": rates[1], "ratio": ratio, "realised": None, "realised_of_ceiling": None}
    for exiting, full, speedup in ((other, first, ratio), (first, other, 1 / ratio)):
        time = exiting["savings"]["time"]
        if time is not None and not _has_exits(full):
            facts |= {"realised": speedup / time["bound"], "realised_of_ceiling": speedup / time["ceiling"]}
    return facts


def _has_exits(run: Mapping[str, Any]) -> bool:
    return any(depth < run["num_layers"] for depth in run["depths"])


def _differing(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Conditions in which the runs differ besides what exits change; a comparison of times takes equal ones."""
    engine, other_engine = first.get("engine") or {}, other.get("engine") or {}
    both = [
        *((name, first.get(name), other.get(name)) for name in CONDITIONS),
        *((name, engine.get(name), other_engine.get(name)) for name in ENGINE_CONDITIONS),
        ("actors that ran", *(facts.get("num_actors_run", facts.get("num_actors")) for facts in (first, other))),
        ("rows before the last run", first.get("rows_before", 0), other.get("rows_before", 0)),
    ]
    return [f"{name}: {a} and {b}" for name, a, b in both if a != b]
