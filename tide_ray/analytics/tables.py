"""The tables of a report: what the terminal prints and what pages show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tide_ray.analytics.comparison import MAX_PAIRS, median_parting
from tide_ray.analytics.queries import PERCENTILES
from tide_ray.calibrate.intervals import FLIPS
from tide_ray.pages.table import ReportTable

NONE = "-"
TIMES = ("mean", *(f"p{q}" for q in PERCENTILES))

_OVERVIEW: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "rows": lambda run: f"{run['totals']['num_rows']:,}",
    "rejected rows": lambda run: f"{run['num_errors']:,}",
    "tokens": lambda run: f"{run['totals']['tokens']:,}",
    "prompt tokens": lambda run: f"{run['totals']['prompt_tokens']:,}",
    "answer, median": lambda run: number(run["totals"]["median_tokens"], "{:,.0f} tokens"),
    "answers cut at max_tokens": lambda run: _share(run["totals"]["cut_short"], run["totals"]["num_rows"]),
    "mean depth": lambda run: f"{mean_depth(run):.2f} of {run['num_layers']}" if run["depths"] else NONE,
    "tokens that left early": lambda run: _share(num_exits(run), run["totals"]["tokens"]),
    "layer runs saved, answers": lambda run: _saved(run["savings"]["answers"]),
    "layer runs saved, all rows": lambda run: _saved(run["savings"]["all_rows"]),
    "tokens/s": lambda run: number(run["facts"].get("tokens_per_second"), "{:,.1f}"),
    "seconds": lambda run: number(run["facts"].get("generation_seconds"), "{:,.1f}"),
    "first token, p50 / p99": lambda run: _two_times(run["first_token"]),
    "mean residents": lambda run: _residents(run),
    "decode rows a step": lambda run: _of_time(run, "residents", "{:,.0f}"),
    "ceiling": lambda run: _of_time(run, "ceiling", "{:.3f}"),
    "free bound": lambda run: _of_time(run, "free_bound", "{:.3f}"),
    "bound": lambda run: _of_time(run, "bound", "{:.3f}"),
    "expected speed-up": lambda run: _of_time(run, "expected", "{:.3f}"),
    "expected seconds saved": lambda run: _of_time(run, "saved_seconds", "{:,.1f}"),
}
_OVERVIEW_WORDS = {
    "layer runs saved, answers": "layer runs saved, answers: of the answers' tokens",
    "layer runs saved, all rows": "all rows: prompt rows and what ran again included, as the engines counted",
    "first token, p50 / p99": "first token: since admission",
    "ceiling": "ceiling: speed-up in decode if skipping were free",
    "bound": "bound: of the best launch policy in the cost model, at as many decode rows a step (free: if asking and "
    "filling K/V cost nothing)",
    "expected speed-up": "expected speed-up and seconds saved: by the cost model, of the policy that ran, against "
    "full depth (engines' seconds, all actors together); what is realised takes a run at full depth to compare with",
}
"""What a line means, said where the line is shown."""


def overview_table(runs: Sequence[Mapping[str, Any]]) -> ReportTable:
    """One column for each run; lines that no run knows anything of are left out."""
    lines = [[name, *(cell(run) for run in runs)] for name, cell in _OVERVIEW.items()]
    known = [line for line in lines if any(cell != NONE for cell in line[1:])]
    words = "; ".join(_OVERVIEW_WORDS[line[0]] for line in known if line[0] in _OVERVIEW_WORDS)
    return ReportTable("overview", ["", *(run["name"] for run in runs)], known, words)


def depths_table(run: Mapping[str, Any]) -> ReportTable:
    """Tokens by depth, and how long they took."""
    total = run["totals"]["tokens"] or 1
    times = {row["depth"]: row for row in run["token_times"]}
    rows = []
    for depth, count in run["depths"].items():
        found = times.get(depth, {})
        cells = [NONE if found.get(name) is None else _milliseconds(found[name]) for name in TIMES]
        name = f"{depth} (full)" if depth == run["num_layers"] else str(depth)
        rows.append([name, f"{count:,}", f"{count / total:.1%}", *cells])
    return ReportTable(
        f"{run['name']}: tokens by depth",
        ["depth", "tokens", "share", *(f"{name}, ms" for name in TIMES)],
        rows,
        "ms: since the sequence's previous token, of all tokens but each answer's first; percentiles are times that so "
        "many tokens do not exceed",
    )


def groups_table(title: str, groups: Sequence[Mapping[str, Any]], num_layers: int) -> ReportTable:
    """Tokens, mean depth and share that left early of each group."""
    rows = []
    for group in groups:
        depths = group["depths"]
        total = sum(depths.values())
        left = sum(count for depth, count in depths.items() if depth < num_layers)
        mean = sum(depth * count for depth, count in depths.items()) / total
        rows.append([group["label"], f"{total:,}", f"{mean:.2f}", f"{left / total:.1%}"])
    return ReportTable(title, ["", "tokens", "mean depth", "left early"], rows)


def stages_table(run: Mapping[str, Any]) -> ReportTable:
    """How full each stage's launches were."""
    return ReportTable(
        f"{run['name']}: occupancy by stage",
        ["stage", "layers", "launches", "rows", "rows a launch"],
        [
            [
                one["name"],
                *(f"{one[name]:,}" for name in ("layers", "launches", "rows")),
                f"{one['rows_per_launch']:,.1f}",
            ]
            for one in run["savings"]["stages"]
        ],
        "rows: of decoding sequences and of prompts",
    )


def errors_table(run: Mapping[str, Any]) -> ReportTable:
    rows = [
        [row["error"], row["stage"], f"{row['num_rows']:,}", str(row["attempts"] or NONE), row["example"]]
        for row in run["errors"]
    ]
    return ReportTable(
        f"{run['name']}: rejected rows", ["reason", "stage", "rows", "most attempts", "one of them"], rows, wraps=True
    )


def slowest_table(run: Mapping[str, Any]) -> ReportTable:
    rows = [
        [
            row["row_id"],
            _milliseconds(row["total_time_us"] - (row["queue_time_us"] or 0)),
            *(_milliseconds(row[name]) for name in ("queue_time_us", "first_token_us")),
            number(row["num_input_tokens"], "{:,}"),
            number(row["num_generated_tokens"], "{:,}"),
            number(row["mean_exit_layer"], "{:.2f}"),
        ]
        for row in run["slowest"]
    ]
    head = ["row", "ms", "in the queue before", "first token", "prompt tokens", "tokens", "mean depth"]
    words = "ms: since admission to the batch; first token: as well"
    return ReportTable(f"{run['name']}: slowest rows", head, rows, words)


def comparison_table(compared: Mapping[str, Any]) -> ReportTable:
    """Means by prompt of both runs, and whether they differ."""
    rows = [
        [
            one["name"],
            f"{one['first']:,.3f}",
            f"{one['other']:,.3f}",
            "{:+,.3f} ({:+,.3f} to {:+,.3f})".format(*one["difference"]),
            f"{one['p_value']:.2g}",
        ]
        for one in compared["measures"]
    ]
    return ReportTable(
        f"{compared['other']} against {compared['first']}, prompt by prompt",
        ["mean over prompts", "first", "other", "difference, 95 % interval", "p-value"],
        rows,
        f"at most {MAX_PAIRS:,} prompts; intervals by resampling prompts; p-value: two-sided, by a permutation test "
        f"that flips the signs of paired differences {FLIPS:,} times (Fisher 1935, Pitman 1937)",
        wraps=True,
    )


def comparison_words(compared: Mapping[str, Any]) -> list[str]:
    """How alike the answers are, and how much faster, in sentences."""
    words = [
        f"{compared['pairs']:,} prompts are in both runs, {compared['only_first']:,} only in the first, "
        f"{compared['only_other']:,} only in the other."
    ]
    if compared["same"] is not None:
        share, low, high = compared["same"]
        words.append(f"{share:.1%} of the answers are identical (95 % interval {low:.1%} to {high:.1%}).")
    if (parting := median_parting(compared["partings"])) is not None:
        words.append(f"Half of those that differ have parted by token {parting} (counted from 0).")
    if (speed := compared["speed"]) is not None:
        words.append(
            f"{speed['other']:,.1f} tokens/s over {speed['first']:,.1f}: {speed['ratio']:.3f}, two runs and not "
            "interleaved, so that whatever else the machine did counts."
        )
        if speed["realised"] is not None:
            words.append(
                f"Realised of what exits could give: {speed['realised']:.3f} of the bound, "
                f"{speed['realised_of_ceiling']:.3f} of the ceiling."
            )
    if compared["conditions"]:
        words.append(f"They also differ in {'; '.join(compared['conditions'])}.")
    return words


def num_exits(run: Mapping[str, Any]) -> int:
    """Tokens that left before the last layer."""
    return sum(count for depth, count in run["depths"].items() if depth < run["num_layers"])


def mean_depth(run: Mapping[str, Any]) -> float:
    return sum(depth * count for depth, count in run["depths"].items()) / sum(run["depths"].values())


def most_residents(run: Mapping[str, Any]) -> int | None:
    """Of all actors together, were they all there at once; None where the run does not say."""
    engine, num_actors = run["facts"].get("engine") or {}, run["facts"].get("num_actors")
    of_each: dict[str, int] = {}
    for process in run["facts"].get("actors") or []:
        if process.get("max_num_seqs"):  # a process that took another's place may hold fewer
            actor = process["actor"]
            of_each[actor] = max(process["max_num_seqs"], of_each.get(actor, 0))
    if of_each:
        return sum(of_each.values())
    return engine["max_num_seqs"] * num_actors if num_actors and "max_num_seqs" in engine else None


def actors(facts: Mapping[str, Any]) -> str | None:
    """How many there were, and of how many at most; None where the run does not say."""
    num, most = facts.get("num_actors"), facts.get("max_actors")
    if not num or most in (None, num):
        return str(num) if num else None
    return f"{num} to {most}, {facts['num_actors_run']} ran"


def _residents(run: Mapping[str, Any]) -> str:
    if run["over_time"] is None:
        return NONE
    residents = run["over_time"]["residents"]
    mean, most = sum(residents) / len(residents), most_residents(run)
    return f"{mean:,.1f}" + (f" of {most:,} ({mean / most:.0%})" if most else "")


def _of_time(run: Mapping[str, Any], name: str, pattern: str) -> str:
    return NONE if run["savings"]["time"] is None else pattern.format(run["savings"]["time"][name])


def _two_times(row: Mapping[str, Any] | None) -> str:
    return NONE if row is None else f"{_milliseconds(row['p50'])} / {_milliseconds(row['p99'])} ms"


def _milliseconds(microseconds: float | None) -> str:
    return NONE if microseconds is None else f"{microseconds / 1000:,.1f}"


def _saved(runs: Mapping[str, Any] | None) -> str:
    return NONE if runs is None else f"{runs['saved']:,} ({runs['share']:.1%})"


def _share(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.1%})" if total else NONE


def number(value: float | None, pattern: str) -> str:
    """``value`` in a format, or what stands for one that is not known."""
    return NONE if value is None else pattern.format(value)
