"""What exits saved one run, against full depth: layer runs counted, and time as the engine's own cost model has it.

*Ceiling*, *bound* and *free bound* are the cost model's ``Limits`` at the mean number of rows that a step decoded;
*expected* is what it says of the policy that ran. *Realised*, over the bound, takes a run at full depth to compare with
(see ``comparison``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DEVICE_FACTS = ("device", "device_name", "num_threads")
"""Of an actor, what makes its costs unlike another's."""
NO_COSTS = "the run's costs were not measured or not written, so what exits were worth in time is not known"
UNLIKE = "actors ran on unlike devices, and what one of them measured does not hold for another"
NOT_IN_TIME = "layers that a mode other than exits skips save launches or nothing, so there is no ceiling"


def savings(facts: Mapping[str, Any], depths: Mapping[int, int], num_layers: int) -> dict[str, Any]:
    """Layer runs saved, launches, and time by the cost model.

    Args:
        facts: of the run, as ``run.json`` has them.
        depths: tokens by depth.
        num_layers: of the model.
    """
    tokens = sum(depths.values())
    engine = facts.get("engine") or {}
    counters = facts.get("counters") or {}
    through = counters.get("rows_through_layer") or []
    time, why_not = _time(facts, engine, counters, depths)
    return {
        "answers": _runs(sum(depth * count for depth, count in depths.items()), tokens * num_layers),
        "all_rows": _runs(sum(through), max(through) * len(through)) if through else None,
        "prompt_exits": counters.get("num_prefill_exits"),
        "deferred_rows": sum((counters.get("deferred_rows") or {}).values()),
        "rows_before": facts.get("rows_before", 0),
        "stages": _stages(engine.get("stages") or [], counters),
        "time": time,
        "why_no_time": why_not,
    }


def _runs(run: int, full: int) -> dict[str, Any]:
    return {"run": run, "full": full, "saved": full - run, "share": 1 - run / full if full else 0.0}


def _stages(stages: Sequence[Mapping[str, Any]], counters: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Launches of each stage and the rows in them, prompt rows included; none where they were not counted."""
    found: list[dict[str, Any]] = []
    launches, through = counters.get("launches") or {}, counters.get("rows_through_layer") or []
    if not launches:
        return found
    for stage in stages:
        num = launches.get(stage["name"], 0)
        layers = stage["layers"]
        rows = through[layers[0]] if layers and layers[0] < len(through) else 0
        found.append(
            {
                "name": stage["name"],
                "layers": len(layers),
                "launches": num,
                "rows": rows,
                "rows_per_launch": rows / num if num else 0.0,
            }
        )
    return found


def _time(
    facts: Mapping[str, Any], engine: Mapping[str, Any], counters: Mapping[str, Any], depths: Mapping[int, int]
) -> tuple[dict[str, Any] | None, str]:
    """Decoding at the mean number of rows that a step decoded; None and why where that cannot be told."""
    exits, costs = engine.get("exits"), engine.get("costs")
    stages, launches = engine.get("stages") or [], counters.get("launches") or {}
    if not isinstance(exits, Mapping):
        return None, "the run had no exits"
    if exits.get("mode", "exits") != "exits":
        return None, NOT_IN_TIME
    steps = launches.get(stages[0]["name"], 0) if stages else 0
    if costs is None or not steps:
        return None, NO_COSTS
    devices = [[actor.get(name) for name in DEVICE_FACTS] for actor in facts.get("actors") or []]
    if any(device != devices[0] for device in devices):
        return None, UNLIKE
    from tide_ray.engine.cost_model import EngineCosts, expected_rate, limits

    curves = EngineCosts.from_json(costs)
    boundaries = exits["boundaries"]
    shares = exit_shares(depths, boundaries)
    tokens = facts.get("generated_tokens") or sum(depths.values())  # those of the run that launches were counted in
    residents = max(round(tokens / steps), 1)
    limit = limits(curves, residents, shares)
    final = (facts.get("final_exits") or [exits])[0]
    holds = [int(hold) for hold in final.get("holds") or [1] * len(shares)]
    ran = expected_rate(curves, residents, shares, [share > 0 for share in shares], holds)
    return {
        "residents": residents,
        "ceiling": limit.ceiling,
        "free_bound": limit.free_bound,
        "bound": limit.bound,
        "expected": ran / limit.full_rate,
        "full_seconds": tokens / limit.full_rate,
        "saved_seconds": tokens / limit.full_rate - tokens / ran,
    }, ""


def exit_shares(depths: Mapping[int, int], boundaries: Sequence[int]) -> list[float]:
    """Of the tokens that reached each boundary the share that left there."""
    left, shares = sum(depths.values()), []
    for boundary in boundaries:
        gone = depths.get(boundary, 0)
        shares.append(gone / left if left else 0.0)
        left -= gone
    return shares
