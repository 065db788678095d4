"""Figures of calibration and certification as tables, and in plain words what the model can gain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tide_ray.calibrate.certify import Certification
from tide_ray.exits.certificates import Certificate
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


def print_certificates(console: Console, certification: Certification, folder: str) -> None:
    """What was certified, one row for each epsilon, and the guarantees in words."""
    certificates = certification.certificates
    table = Table(title=f"certified settings at delta {certificates[0].delta:g}", title_justify="left")
    for name in ("epsilon", "thresholds", "prefill", "mean loss", "p-value", "exits", "prompt", "saved", "ceiling"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in certificates:
        table.add_row(*_certificate_cells(one))
    console.print(table)
    console.print(
        f"on {certificates[0].num_prompts:,} prompts, {len(certification.tested)} settings tested. exits: share of "
        "generated tokens; prompt: of prompt tokens; saved: of all layer runs; ceiling: if skipping were free"
    )
    for one in certificates:
        console.print(f"{one.epsilon:g}: {one.guarantee}")
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in certification.seconds.items())
    console.print(f"{seconds}; written to {folder}")


def _certificate_cells(one: Certificate) -> tuple[str, ...]:
    if not one.has_exits:
        return (f"{one.epsilon:g}", "full depth", *[""] * 7)
    return (
        f"{one.epsilon:g}",
        ", ".join("-" if threshold is None else f"{threshold:.3f}" for threshold in one.thresholds),
        "-" if one.prefill_threshold is None else f"{one.prefill_threshold:.4f}",
        f"{one.mean_loss:.3%}",
        f"{one.p_value:.2g}",
        f"{one.exit_share:.1%}",
        f"{one.prefill_exit_share:.1%}",
        f"{one.saving:.1%}",
        f"{1 / (1 - one.saving):.2f}",
    )


def print_evaluation(console: Console, facts: dict[str, Any]) -> None:
    """Every setting on prompts that it was not chosen on."""
    table = Table(title=f"{facts['prompts']:,} prompts against full depth, 95 % intervals", title_justify="left")
    for name in ("setting", "disagreement", "same answers", "right answers", "depth", "prompt", "ceiling"):
        table.add_column(name, justify="left" if name == "setting" else "right", no_wrap=name != "setting")
    for row in facts["variants"]:
        shares = ("disagreement", "identical_answers", "right_answers")
        table.add_row(
            row["name"],
            *(_percent(row[name]) if name in row else "-" for name in shares),
            f"{row['mean_depth']:.1f}" if "mean_depth" in row else "-",
            f"{row['prompt_rows_stopped']:.0%}" if "prompt_rows_stopped" in row else "-",
            f"{row['ceiling_in_layers']:.2f}" if "ceiling_in_layers" in row else "-",
        )
    console.print(table)
    console.print(
        "disagreement: share of an answer's tokens unlike full depth's, made to follow full depth's answer, mean over "
        "prompts; full depth again: against itself in other batches; prompt: share of its tokens that stopped; "
        "ceiling: if skipping were free"
    )


def _percent(interval: Sequence[float]) -> str:
    mean, low, high = (100 * share for share in interval)
    return f"{mean:.2f} % ({low:.1f}-{high:.1f})"


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
