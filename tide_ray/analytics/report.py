"""``tide-ray report``: what runs say, in the terminal and as a page of one file that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tide_ray.analytics import plots, tables
from tide_ray.analytics.comparison import compare
from tide_ray.analytics.dataset import Analytics
from tide_ray.analytics.measures import measure, sample
from tide_ray.files import local_path
from tide_ray.pages.drawing import data_uri
from tide_ray.pages.page import write_page
from tide_ray.types import UserError

NUM_SAMPLES, SAMPLE_TOKENS = 6, 256
PROMPT_CHARACTERS = 600
OPACITY = 0.2, 0.75
"""Of the colour of a token that left early: the least, and what is added by the share of layers that it left out."""


@dataclass(frozen=True, slots=True)
class Report:
    """Facts of every run, what each run after the first changes against it, and sampled answers by run."""

    runs: list[dict[str, Any]]
    comparisons: list[dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]]
    notes: list[str]


def make_report(analytics: Analytics, categories: Sequence[str] | None = None) -> Report:
    """Measure every output that is loaded. Raises UserError where a category is no column."""
    runs = [measure(analytics, output, categories) for output in analytics.outputs]
    samples = {one.name: sample(analytics, one, NUM_SAMPLES, SAMPLE_TOKENS) for one in analytics.outputs}
    comparisons = [compare(analytics, runs[0], run) for run in runs[1:]]
    notes = [*analytics.notes, *(f"{run['name']}: {note}" for run in runs for note in unknown(run))]
    return Report(runs, comparisons, samples, notes)


def unknown(run: Mapping[str, Any]) -> list[str]:
    """What the output does not tell, a sentence each."""
    facts, totals, found = run["facts"], run["totals"], []
    if not run["is_finished"]:
        found.append("the job is not finished: counts are of what is committed so far")
    if not totals["num_rows"]:
        found.append("there are no rows")
        return found
    if not run["knows_num_layers"]:
        found.append(f"the number of layers is not written; the deepest token's, {run['num_layers']}, is taken for it")
    if totals["timed_rows"] < totals["num_rows"]:
        found.append(f"{totals['num_rows'] - totals['timed_rows']:,} rows have no token times")
    if run["over_time"] is None:
        found.append("rows do not say when they were finished, so there is nothing over time")
    elif totals["dated_rows"] < totals["num_rows"]:
        found.append(f"over time without the {totals['num_rows'] - totals['dated_rows']:,} rows that have no date")
    if run["savings"]["all_rows"] is None:
        found.append("engines' counters are not written, so layer runs of prompts are not known")
    elif run["savings"]["rows_before"]:
        found.append(
            f"counters and rates are of the last run, which found {facts['rows_before']:,} rows done by earlier ones"
        )
    if run["savings"]["time"] is None:
        found.append(f"no ceiling, bound or seconds saved: {run['savings']['why_no_time']}")
    return found


def print_report(console: Console, report: Report) -> None:
    """The summary for a terminal; the page has more."""
    tables.overview_table(report.runs).print(console)
    for run in report.runs:
        if run["depths"]:
            tables.depths_table(run).print(console)
        for title, groups in _groups(run):
            tables.groups_table(f"{run['name']}: {title}", groups, run["num_layers"]).print(console)
        if run["errors"]:
            tables.errors_table(run).print(console)
    for compared in report.comparisons:
        if compared["measures"]:
            tables.comparison_table(compared).print(console)
        for words in tables.comparison_words(compared):
            console.print(words, markup=False, highlight=False)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, highlight=False)


def write_report(file: str | Path, report: Report) -> Path:
    """Write the page, which appears complete or not at all. Returns the file. Raises UserError if it cannot be."""
    has_depths = any(run["depths"] for run in report.runs)
    page = {
        "title": ", ".join(run["name"] for run in report.runs),
        "overview": tables.overview_table(report.runs),
        "histogram": data_uri(plots.depth_histogram(report.runs)) if has_depths else None,
        "runs": [_section(run, report.samples[run["name"]]) for run in report.runs],
        "comparisons": [_comparison(compared) for compared in report.comparisons],
        "notes": report.notes,
    }
    try:
        return write_page(local_path(file, "output"), "tide_ray.analytics", "analysis.html", page)
    except OSError as error:
        raise UserError(f"output: cannot write {str(file)!r}: {error.strerror}") from None


def _groups(run: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Everything that depths are told by, with a title; nothing where all tokens ran every layer."""
    named = [
        ("depth by position in the answer", run["by_position"]),
        ("depth by prompt length", run["by_prompt_length"]),
        ("depth by token class", run["by_class"]),
        *((f"depth by {name}", groups) for name, groups in run["by_category"].items()),
    ]
    return [(title, groups) for title, groups in named if groups and tables.num_exits(run)]


def _section(run: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the page shows of one run."""
    times = run["over_time"]
    over_time = []
    if times is not None:
        most = tables.most_residents(run)
        over_time = [
            ("Tokens per second over time", data_uri(plots.over_time(times, "tokens_per_second", "tokens/s"))),
            ("Resident sequences over time", data_uri(plots.over_time(times, "residents", "resident sequences", most))),
        ]
    return {
        "name": run["name"],
        "facts": _facts(run),
        "depths": tables.depths_table(run) if run["depths"] else None,
        "groups": [
            (
                title,
                data_uri(plots.exits_by(groups, run["num_layers"])),
                tables.groups_table(title, groups, run["num_layers"]),
            )
            for title, groups in _groups(run)
        ],
        "over_time": over_time,
        "stages": tables.stages_table(run) if run["savings"]["stages"] else None,
        "errors": tables.errors_table(run) if run["errors"] else None,
        "slowest": tables.slowest_table(run) if run["slowest"] else None,
        "legend": [(depth, _opacity(depth, run["num_layers"])) for depth in run["depths"]],
        "num_layers": run["num_layers"],
        "samples": [_sampled(one, run["num_layers"]) for one in samples],
    }


def _facts(run: Mapping[str, Any]) -> dict[str, Any]:
    """What the run was, as far as it is written."""
    facts = run["facts"]
    engine: Mapping[str, Any] = facts.get("engine") or {}
    exits: Mapping[str, Any] = engine["exits"] if isinstance(engine.get("exits"), Mapping) else {}
    certificate = exits.get("certificate") or {}
    known = {
        "folder": run["path"],
        "model": facts.get("model"),
        "dtype, device": ", ".join(str(engine[name]) for name in ("dtype", "device") if name in engine),
        "policy": engine.get("policy", facts.get("policy")),
        "boundaries": ", ".join(map(str, exits.get("boundaries") or [])),
        "K/V policy": exits.get("kv_policy"),
        "guarantee": certificate.get("guarantee"),
        "actors": tables.actors(facts),
        "most residents of an actor": engine.get("max_num_seqs"),
        "started, finished": ", ".join(str(facts[name]) for name in ("started", "finished") if name in facts),
        "tide_ray": facts.get("tide_ray_version"),
    }
    return {name: value for name, value in known.items() if value}


def _sampled(row: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """An answer for the page: its start, token by token, each with its depth and how strongly it is coloured."""
    prompt = row["prompt"] or ""
    return {
        "row_id": row["row_id"],
        "prompt": prompt[:PROMPT_CHARACTERS] + ("..." if len(prompt) > PROMPT_CHARACTERS else ""),
        "mean_depth": tables.number(row["mean_exit_layer"], "{:.2f}"),
        "num_tokens": row["num_generated_tokens"],
        "num_shown": len(row["pieces"]),
        "pieces": [(piece or "\u00b7", depth, _opacity(depth, num_layers)) for piece, depth in row["pieces"]],
    }


def _opacity(depth: int, num_layers: int) -> float:
    """Of a token's colour: none at full depth, and the stronger the earlier it left."""
    least, more = OPACITY
    return 0.0 if depth >= num_layers else round(least + more * (1 - depth / num_layers), 2)


def _comparison(compared: Mapping[str, Any]) -> dict[str, Any]:
    partings = compared["partings"]
    return {
        "title": f"{compared['other']} against {compared['first']}",
        "words": tables.comparison_words(compared),
        "table": tables.comparison_table(compared) if compared["measures"] else None,
        "partings": data_uri(plots.partings(partings, compared["pairs"])) if partings else None,
    }
