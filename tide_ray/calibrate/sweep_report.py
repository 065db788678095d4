"""What a sweep tells: of each checkpoint a few figures, and a table over the models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from tide_ray.calibrate.report import MIN_CEILING, best_boundary, verdict
from tide_ray.calibrate.tables import sweep_table
from tide_ray.exits.checkpoint import Routers

OK, KEPT, FAILED, STOPPED = "ok", "kept", "failed", "stopped"
"""Statuses: calibrated now; done before; failed; not finished when the sweep was interrupted."""


def summary(routers: Routers) -> dict[str, Any]:
    """Figures of a checkpoint. Exit shares and errors are of its best boundary, by error level."""
    metrics, depths = routers.facts.metrics, routers.depths
    best, level = best_boundary(metrics, depths)
    ceiling = best["exits"][level]["ceiling"]
    return {
        "num_layers": routers.facts.num_layers,
        "boundaries": list(depths),
        "agreement": {str(row["depth"]): row["head_agreement"] for row in metrics["candidates"]},
        "best_boundary": best["depth"],
        "exit_share": {name: row["share"] for name, row in best["exits"].items()},
        "exit_error": {name: row["error"] for name, row in best["exits"].items()},
        "ceiling": ceiling,
        "suitability": "poor" if ceiling < MIN_CEILING else "gains",
        "verdict": verdict(metrics, depths),
        "seconds": metrics["seconds"],
    }


def print_sweep(console: Console, rows: Sequence[Mapping[str, Any]], output: str) -> None:
    """The table over the models, and in a line each what went wrong."""
    sweep_table(rows).print(console)
    for row in rows:
        if row["status"] == FAILED:
            console.print(f"{row['name']}: failed in the phase {row['phase']}: {row['error']}", markup=False)
    console.print(f"written to {output}")
