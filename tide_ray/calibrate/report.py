"""What calibration, certification and evaluation print, and in plain words what the model can gain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from tide_ray.calibrate.certify import Certification
from tide_ray.calibrate.tables import candidates_table, certificates_table, evaluation_table, kv_policies_table
from tide_ray.exits.checkpoint import Routers

MIN_CEILING = 1.01
"""Speed-up in decode, were skipping free, below which exits are not worth having."""


def print_report(console: Console, routers: Routers, output: str) -> None:
    """Candidates, chosen boundaries and a verdict."""
    metrics = routers.facts.metrics
    candidates_table(metrics["candidates"], routers.depths).print(console)
    if screened_out := screened_out_words(metrics):
        console.print(screened_out)
    kv_policies_table(metrics["kv_policies"]).print(console)
    console.print(verdict(metrics, routers.depths))
    console.print(f"{_seconds(metrics['seconds'])}; written to {output}")


def screened_out_words(metrics: Mapping[str, Any]) -> str:
    """Which depths were not looked at closely, or ""."""
    compared = {str(row["depth"]) for row in metrics["candidates"]}
    screened_out = {depth: saving for depth, saving in metrics["screened"].items() if depth not in compared}
    if not screened_out:
        return ""
    savings = ", ".join(f"{depth} ({saving:.1%})" for depth, saving in screened_out.items())
    return f"screened out for the little they could save at best (share of layer runs): {savings}"


def print_certificates(console: Console, certification: Certification, folder: str) -> None:
    """What was certified, one row for each epsilon, and the guarantees in words."""
    certificates_table(certification.certificates, len(certification.tested)).print(console)
    for one in certification.certificates:
        console.print(f"{one.epsilon:g}: {one.guarantee}")
    console.print(f"{_seconds(certification.seconds)}; written to {folder}")


def print_evaluation(console: Console, facts: Mapping[str, Any]) -> None:
    """Every setting on prompts that it was not chosen on, and what other rules do at the same cost."""
    evaluation_table(facts).print(console)
    console.print(baselines_words(facts), markup=False)


def baselines_words(facts: Mapping[str, Any]) -> str:
    """At whose cost the other rules run, and why some do not."""
    if "baselines" not in facts:
        return "no other rules were asked for"
    words = f"other rules run at the cost of {facts['baselines']['at_the_cost_of']}"
    left_out = [f"{name}: {reason}" for name, reason in facts["baselines"]["left_out"].items()]
    return words + (f"; left out: {'; '.join(left_out)}" if left_out else "")


def _seconds(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())


def verdict(metrics: Mapping[str, Any], depths: tuple[int, ...]) -> str:
    """One sentence on what exits can give this model at the strictest calibrated error."""
    best, level = best_boundary(metrics, depths)
    ceiling = best["exits"][level]["ceiling"]
    if ceiling < MIN_CEILING:
        return f"Suitability: poor. At {float(level):.0%} error among exits nothing is gained (ceiling {ceiling:.3f}x)."
    return (
        f"Suitability: at {float(level):.0%} error among exits this model gains at most {ceiling:.2f}x in decode "
        f"(depth {best['depth']}, {best['exits'][level]['share']:.0%} of tokens)."
    )


def best_boundary(metrics: Mapping[str, Any], depths: tuple[int, ...]) -> tuple[dict[str, Any], str]:
    """Figures of the boundary with the highest ceiling at the strictest calibrated error, and that error."""
    chosen = [row for row in metrics["candidates"] if row["depth"] in depths]
    level = next(iter(chosen[0]["exits"]))
    return max(chosen, key=lambda row: row["exits"][level]["ceiling"]), level
