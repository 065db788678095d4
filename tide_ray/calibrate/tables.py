"""The tables of calibration, certification, evaluation and sweeps: what the terminal prints and what pages show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tide_ray.exits.certificates import Certificate
from tide_ray.pages.table import ReportTable


def candidates_table(candidates: Sequence[Mapping[str, Any]], depths: Sequence[int]) -> ReportTable:
    """Figures of every depth that was compared; those in the checkpoint stand out."""
    levels = list(candidates[0]["exits"]) if candidates else []
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "depth": lambda row: str(row["depth"]),
        "lens": lambda row: f"{row['lens_agreement']:.3f}",
        "head": lambda row: f"{row['head_agreement']:.3f}",
        "cosine": lambda row: f"{row['mean_cosine']:.2f}",
        "> .98": lambda row: f"{row['share_cosine_above_0.98']:.1%}",
        "AUC": lambda row: f"{row['auc']:.2f}",
        "ECE": lambda row: f"{row['ece']:.3f}",
        **{f"{float(level):.0%} error": _exits_at(level) for level in levels},
        "ceiling": lambda row: f"{row['exits'][levels[0]]['ceiling']:.2f}",
    }
    return ReportTable(
        "boundaries on held-out prompts",
        list(columns),
        [[cell(row) for cell in columns.values()] for row in candidates],
        "lens, head: share of tokens whose top-1 there is full depth's, without and with the exit head; error: % of "
        "tokens that exit at thresholds calibrated for it (% wrong among them); ceiling: at the first of them, if "
        "skipping were free; *: in the checkpoint",
        frozenset(number for number, row in enumerate(candidates) if row["depth"] in depths),
    )


def _exits_at(level: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: f"{100 * row['exits'][level]['share']:.1f} ({100 * row['exits'][level]['error']:.1f})"


def kv_policies_table(policies: Sequence[Mapping[str, Any]]) -> ReportTable:
    """What exits cost under each K/V policy."""
    return ReportTable(
        "K/V policies",
        ("K/V policy", "exits", "unlike %", "others unlike %"),
        [
            [row["kv_policy"], f"{row['exit_share']:.0%}", _percent(row["disagreement"]), _percent(row["others"])]
            for row in policies
        ],
        "unlike: share of an answer's tokens unlike full depth's when the surest tokens exit, each after full depth's "
        "own tokens; others unlike: of those that run every layer, which meet the exits' K/V only (95 % intervals by "
        "prompt)",
    )


def certificates_table(certificates: Sequence[Certificate], num_tested: int) -> ReportTable:
    """One row for each epsilon."""
    return ReportTable(
        f"certified settings at delta {certificates[0].delta:g}",
        ("epsilon", "thresholds", "prefill", "mean loss", "p-value", "exits", "prompt", "saved", "ceiling"),
        [_certificate_cells(one) for one in certificates],
        f"on {certificates[0].num_prompts:,} prompts, {num_tested} settings tested. exits: share of generated tokens; "
        "prompt: of prompt tokens; saved: of all layer runs; ceiling: if skipping were free",
    )


def _certificate_cells(one: Certificate) -> list[str]:
    if not one.has_exits:
        return [f"{one.epsilon:g}", "full depth", *[""] * 7]
    return [
        f"{one.epsilon:g}",
        ", ".join("-" if threshold is None else f"{threshold:.3f}" for threshold in one.thresholds),
        "-" if one.prefill_threshold is None else f"{one.prefill_threshold:.4f}",
        f"{one.mean_loss:.3%}",
        f"{one.p_value:.2g}",
        f"{one.exit_share:.1%}",
        f"{one.prefill_exit_share:.1%}",
        f"{one.saving:.1%}",
        f"{1 / (1 - one.saving):.2f}",
    ]


def evaluation_table(facts: Mapping[str, Any]) -> ReportTable:
    """Every setting on prompts that it was not chosen on; baselines follow, settings stand out."""
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "setting": lambda row: str(row["name"]),
        "unlike %": lambda row: _percent(row.get("disagreement")),
        "same %": lambda row: _percent(row.get("identical_answers")),
        "parts at": lambda row: _spread(row.get("first_divergence"), "{:.0f}"),
        "right %": lambda row: _percent(row.get("right_answers")),
        "perplexity": lambda row: _spread(row.get("perplexity_ratio"), "{:.3f}"),
        "depth": lambda row: f"{row['mean_depth']:.1f}" if "mean_depth" in row else "-",
        "prompt": lambda row: f"{row['prompt_rows_stopped']:.0%}" if "prompt_rows_stopped" in row else "-",
        "cost": lambda row: f"{row['mean_cost']:.3f}" if "mean_cost" in row else "-",
        "speed": lambda row: _spread(row.get("speed"), "{:.2f}"),
        "in jobs": lambda row: _spread(row.get("speed_in_jobs"), "{:.2f}"),
    }
    rows = facts["variants"]
    for name, key in (("right %", "right_answers"), ("perplexity", "perplexity_ratio")):
        if not any(key in row for row in rows):
            del columns[name]
    return ReportTable(
        f"{facts['prompts']:,} prompts against full depth, 95 % intervals",
        list(columns),
        [[cell(row) for cell in columns.values()] for row in rows],
        "unlike: share of an answer's tokens unlike full depth's, made to follow full depth's answer, mean over "
        "prompts; full depth again: against itself in other batches; same, right: shares of the answers that the "
        "setting gives by itself; parts at: number of the first token unlike, median of the answers that part; "
        "perplexity: of the text, over full depth's; depth: of an answer's tokens; prompt: share of its tokens that "
        "stop; cost: share of layer runs, prompts included; speed: over full depth, both following the same tokens in "
        "turn (median, least to most); in jobs: with boundaries off where they do not pay; *: the checkpoint's own",
        frozenset(n for n, row in enumerate(rows) if "exit_share" in row and not row.get("is_baseline")),
        wraps=True,
    )


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> ReportTable:
    """The models of a sweep."""
    levels = next((list(row["exit_share"]) for row in rows if "exit_share" in row), [])
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "layers": lambda row: str(row["num_layers"]),
        "boundaries": lambda row: ", ".join(map(str, row["boundaries"])),
        "agreement": lambda row: ", ".join(f"{row['agreement'][str(d)]:.3f}" for d in row["boundaries"]),
        **{f"exits {float(level):.0%}": _share_at(level) for level in levels},
        "ceiling": lambda row: f"{row['ceiling']:.2f}",
        "verdict": lambda row: str(row["suitability"]),
        "seconds": lambda row: f"{row['seconds']['total']:.0f}",
    }
    return ReportTable(
        "calibrated models",
        ["model", *columns, "status"],
        [
            [row["name"], *(cell(row) if "exit_share" in row else "" for cell in columns.values()), row["status"]]
            for row in rows
        ],
        "agreement: share of tokens whose top-1 through the exit head is full depth's, by boundary; exits: share of "
        "tokens that exit at the best boundary at this calibrated error; ceiling: at the first of these, if skipping "
        "were free; seconds: of all workers together",
    )


def _share_at(level: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: f"{row['exit_share'][level]:.1%}"


def _percent(interval: Sequence[float] | None) -> str:
    if interval is None:
        return "-"
    mean, low, high = (100 * share for share in interval)
    return f"{mean:.2f} ({low:.1f}-{high:.1f})"


def _spread(interval: Sequence[float] | None, number: str) -> str:
    if interval is None:
        return "-"
    middle, low, high = (number.format(value) for value in interval)
    return f"{middle} ({low}-{high})"
