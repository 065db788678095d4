"""A calibration's figures as a table, and in plain words what the model can gain."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from tide_ray.exits.checkpoint import Routers

MIN_CEILING = 1.01
"""Speed-up in decode, were skipping free, below which exits are not worth having."""


def print_report(console: Console, routers: Routers, output: str) -> None:
    """Candidates, chosen boundaries and a verdict."""
    metrics = routers.facts.metrics
    levels = list(metrics["candidates"][0]["exits"])
    table = Table(title="boundaries on held-out prompts", title_justify="left")
    columns = ("depth", "lens", "head", "cosine", "> .98", "AUC", "ECE")
    for name in (*columns, *(f"{float(level):.0%} error" for level in levels), "ceiling"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in metrics["candidates"]:
        exits = row["exits"]
        mark = "*" if row["depth"] in routers.depths else ""
        table.add_row(
            f"{mark}{row['depth']}",
            f"{row['lens_agreement']:.3f}",
            f"{row['head_agreement']:.3f}",
            f"{row['mean_cosine']:.2f}",
            f"{row['share_cosine_above_0.98']:.1%}",
            f"{row['auc']:.2f}",
            f"{row['ece']:.3f}",
            *(f"{100 * exits[level]['share']:.1f} ({100 * exits[level]['error']:.1f})" for level in levels),
            f"{exits[levels[0]]['ceiling']:.2f}",
        )
    console.print(table)
    console.print(
        "lens, head: share of tokens whose top-1 there is full depth's, without and with the exit head; error: % of "
        "tokens that exit at thresholds calibrated for it (% wrong among them); ceiling: at the first of them, if "
        "skipping were free; *: in the checkpoint"
    )
    compared = {str(row["depth"]) for row in metrics["candidates"]}
    screened_out = {depth: saving for depth, saving in metrics["screened"].items() if depth not in compared}
    if screened_out:
        savings = ", ".join(f"{depth} ({saving:.1%})" for depth, saving in screened_out.items())
        console.print(f"screened out for the little they could save at best (share of layer runs): {savings}")
    console.print(verdict(metrics, routers.depths))
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in metrics["seconds"].items())
    console.print(f"{seconds}; written to {output}")


def verdict(metrics: dict[str, Any], depths: tuple[int, ...]) -> str:
    """One sentence on what exits can give this model at the strictest calibrated error."""
    best, level = best_boundary(metrics, depths)
    ceiling = best["exits"][level]["ceiling"]
    if ceiling < MIN_CEILING:
        return f"Suitability: poor. At {float(level):.0%} error among exits nothing is gained (ceiling {ceiling:.3f}x)."
    return (
        f"Suitability: at {float(level):.0%} error among exits this model gains at most {ceiling:.2f}x in decode "
        f"(depth {best['depth']}, {best['exits'][level]['share']:.0%} of tokens)."
    )


def best_boundary(metrics: dict[str, Any], depths: tuple[int, ...]) -> tuple[dict[str, Any], str]:
    """Figures of the boundary with the highest ceiling at the strictest calibrated error, and that error."""
    chosen = [row for row in metrics["candidates"] if row["depth"] in depths]
    level = next(iter(chosen[0]["exits"]))
    return max(chosen, key=lambda row: row["exits"][level]["ceiling"]), level
