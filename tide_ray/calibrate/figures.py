"""Figures of calibration reports: plain facts in, SVG out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tide_ray.pages.drawing import COLOURS, drawn, look


def depth_profile(profile: Mapping[str, Sequence[float]], candidates: Sequence[Mapping[str, Any]]) -> bytes:
    """Agreement with full depth and cosine with its state by depth; the exit heads' agreement where there are some."""
    with drawn("depth (layers run)", "share of tokens, cosine") as (axes, svg):
        if profile:
            axes.plot(profile["depth"], profile["lens_agreement"], label="top-1 without an exit head", color=COLOURS[1])
            axes.plot(profile["depth"], profile["cosine"], "--", label="cosine with the final state", color=COLOURS[6])
        heads = [(row["depth"], row["head_agreement"]) for row in candidates]
        axes.plot(*zip(*heads, strict=True), "o", label="top-1 through the exit head", color=COLOURS[0])
        axes.set_ylim(0, 1.02)
        axes.legend()
    return svg.getvalue()


def reliability(candidates: Sequence[Mapping[str, Any]]) -> bytes:
    """How often exits were right by the gate's score; on the diagonal a score is a probability."""
    with drawn("gate score", "share right, here and later") as (axes, svg):
        axes.plot([0, 1], [0, 1], ":", color="#888888")
        for number, row in enumerate(candidates):
            scores, shares, _ = zip(*row["reliability"], strict=True)
            axes.plot(scores, shares, label=f"depth {row['depth']} (ECE {row['ece']:.3f})", **look(number))
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.legend()
    return svg.getvalue()


def coverage(candidates: Sequence[Mapping[str, Any]]) -> bytes:
    """Precision among the surest tokens by how many of them leave, ranked by gate and by the head's probability."""
    with drawn("coverage: share of tokens that leave", "precision: share of them that is right") as (axes, svg):
        for number, row in enumerate(candidates):
            curve, one = row["coverage"], look(number)
            axes.plot(curve["share"], curve["by_gate"], label=f"depth {row['depth']}, gate", **one)
            axes.plot(curve["share"], curve["by_probability"], ":", color=one["color"], label="  by probability")
        axes.set_xlim(0, 1)
        axes.legend()
    return svg.getvalue()


def quality_and_speed(variants: Sequence[Mapping[str, Any]]) -> bytes:
    """Agreement with full depth against realised speed, with intervals; full depth against itself is the noise."""
    with drawn("realised speed over full depth", "agreement with full depth, %") as (axes, svg):
        floor = next((row for row in variants if "speed" not in row and "disagreement" in row), None)
        if floor is not None:
            axes.axhline(_agreement(floor)[0], linestyle=":", color="#888888", label=str(floor["name"]))
        measured = [row for row in variants if "speed" in row and "disagreement" in row]
        for number, row in enumerate(measured):
            (x, left, right), (y, low, high) = row["speed"], _agreement(row)
            one = look(number)
            is_baseline = row.get("is_baseline", False)
            axes.errorbar(
                [x], [y], xerr=[[x - left], [right - x]], yerr=[[y - low], [high - y]], label=str(row["name"]),
                fmt=one["marker"], color=one["color"], mfc="white" if is_baseline else one["color"], capsize=2,
            )  # fmt: skip
        axes.axvline(1.0, color="#888888", linewidth=0.8)
        axes.legend(fontsize=8)
    return svg.getvalue()


def agreement_of_models(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Agreement through exit heads by depth as a share of each model's layers."""
    with drawn("depth, share of the model's layers", "top-1 as full depth's") as (axes, svg):
        for number, row in enumerate(rows):
            depths = sorted(map(int, row["agreement"]))
            shares = [depth / row["num_layers"] for depth in depths]
            axes.plot(shares, [row["agreement"][str(d)] for d in depths], label=str(row["name"]), **look(number))
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.legend(fontsize=8)
    return svg.getvalue()


def _agreement(row: Mapping[str, Any]) -> tuple[float, float, float]:
    mean, low, high = (100 * (1 - share) for share in row["disagreement"])
    return mean, high, low
