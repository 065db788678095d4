"""Figures of runs: plain facts in, SVG out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tide_ray.pages.drawing import COLOURS, drawn, look

SIZE = (5.2, 3.2)
"""Inches: text stays legible on a phone, where a figure is as wide as the screen."""
HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "--")
"""Told apart in print without colours."""
BAR_INCHES = 0.3
MAX_DEPTHS = len(HATCHES)


def depth_histogram(runs: Sequence[Mapping[str, Any]]) -> bytes:
    """Share of tokens by depth, the runs side by side."""
    depths = sorted({depth for run in runs for depth in run["depths"]})
    width = 0.8 / max(len(runs), 1)
    with drawn("depth (layers run)", "share of tokens, %", SIZE) as (axes, svg):
        for number, run in enumerate(runs):
            total = sum(run["depths"].values()) or 1
            places = [place + (number - (len(runs) - 1) / 2) * width for place in range(len(depths))]
            shares = [100 * run["depths"].get(depth, 0) / total for depth in depths]
            bars = axes.bar(places, shares, width, label=run["name"], **_filled(number))
            if len(depths) * len(runs) <= 16:
                axes.bar_label(bars, fmt="%.1f", fontsize=8)
        axes.set_xticks(range(len(depths)), [str(depth) for depth in depths])
        axes.grid(visible=False, axis="x")
        if len(runs) > 1:
            axes.legend(fontsize=8)
    return svg.getvalue()


def exits_by(groups: Sequence[Mapping[str, Any]], num_layers: int) -> bytes:
    """Share of the tokens of each group that left early, by the depth that they left at."""
    depths = sorted({depth for group in groups for depth in group["depths"] if depth < num_layers})
    shown = depths if len(depths) <= MAX_DEPTHS else []
    size = (SIZE[0], 1.3 + BAR_INCHES * len(groups))
    with drawn("tokens that left early, %", "", size) as (axes, svg):
        lefts = [0.0] * len(groups)
        for number, depth in enumerate(shown):
            shares = [_share(group["depths"], depth) for group in groups]
            axes.barh(range(len(groups)), shares, left=lefts, label=f"at depth {depth}", **_filled(number))
            lefts = [left + share for left, share in zip(lefts, shares, strict=True)]
        if not shown:
            shares = [sum(_share(group["depths"], depth) for depth in depths) for group in groups]
            axes.barh(range(len(groups)), shares, **_filled(0))
        axes.set_yticks(range(len(groups)), [str(group["label"])[:24] for group in groups])
        axes.invert_yaxis()
        axes.set_xlim(0, max(axes.get_xlim()[1], 1.0) if depths else 1.0)
        axes.grid(visible=False, axis="y")
        if shown:  # above, where no bar is
            axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False)
    return svg.getvalue()


def over_time(times: Mapping[str, Any], key: str, what: str, limit: float | None = None) -> bytes:
    """``key`` of each interval of a run; ``limit`` is the most that it can be."""
    values = times[key]
    width = times["seconds"] / len(values)
    with drawn("seconds since the first row was given", what, SIZE) as (axes, svg):
        axes.stairs(values, [number * width for number in range(len(values) + 1)], color=COLOURS[0], linewidth=1.5)
        if limit is not None:
            axes.axhline(limit, linestyle=":", color="#666666", label=f"most: {limit:,.0f}")
            axes.legend(fontsize=8)
        axes.set_ylim(bottom=0)
        axes.set_xlim(0, times["seconds"])
    return svg.getvalue()


def partings(rows: Sequence[Mapping[str, Any]], pairs: int) -> bytes:
    """Share of answers that have parted by each position."""
    upto, places, shares = 0, [0], [0.0]
    for row in rows:
        places += [row["position"], row["position"]]
        shares += [shares[-1], 100 * (upto := upto + row["answers"]) / pairs]
    with drawn("position in the answer", "answers that have parted, %", SIZE) as (axes, svg):
        axes.plot(places, shares, color=look(0)["color"])
        axes.set_ylim(0, 102)
        axes.set_xlim(left=0)
    return svg.getvalue()


def _share(depths: Mapping[int, int], depth: int) -> float:
    return 100 * depths.get(depth, 0) / sum(depths.values())


def _filled(number: int) -> dict[str, Any]:
    colour, hatch = COLOURS[number % len(COLOURS)], HATCHES[number % len(HATCHES)]
    return {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
