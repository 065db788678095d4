"""What a sweep tells: of each checkpoint a few figures, and a table over the models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tide_ray.calibrate.report import MIN_CEILING, best_boundary, verdict
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
    levels = next((list(row["exit_share"]) for row in rows if "exit_share" in row), [])
    table = Table(title="calibrated models", title_justify="left")
    for name in ("model", "layers", "boundaries", "agreement"):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=name != "model")
    for level in levels:
        table.add_column(f"exits {float(level):.0%}", justify="right")
    for name in ("ceiling", "verdict", "seconds", "status"):
        table.add_column(name, justify="right")
    for row in rows:
        if "exit_share" not in row:
            table.add_row(row["name"], *[""] * (6 + len(levels)), row["status"])
            continue
        table.add_row(
            row["name"],
            str(row["num_layers"]),
            ", ".join(map(str, row["boundaries"])),
            ", ".join(f"{row['agreement'][str(depth)]:.3f}" for depth in row["boundaries"]),
            *(f"{row['exit_share'][level]:.1%}" for level in levels),
            f"{row['ceiling']:.2f}",
            row["suitability"],
            f"{row['seconds']['total']:.0f}",
            row["status"],
        )
    console.print(table)
    console.print(
        "agreement: share of tokens whose top-1 through the exit head is full depth's, by boundary; exits: share of "
        "tokens that exit at the best boundary at this calibrated error; ceiling: at the first of these, if skipping "
        "were free; seconds: of all workers together"
    )
    for row in rows:
        if row["status"] == FAILED:
            console.print(f"{row['name']}: failed in the phase {row['phase']}: {row['error']}", markup=False)
    console.print(f"written to {output}")
