"""What figures share: colours, style, and axes that become SVG, by matplotlib without a display."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, told apart with any colour vision."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SIZE = (6.4, 4.0)
_STYLE: dict[Any, Any] = {  # older releases type the keys as plain strings, newer ones each by its name
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "tide-ray",  # the same facts make the same bytes
    "text.parse_math": False,  # names may have dollars in them
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "font.size": 10,
    "hatch.linewidth": 0.6,
}


def data_uri(svg: bytes) -> str:
    """An SVG as the source of an image, which runs no script and fetches nothing."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode('ascii')}"


def look(number: int) -> dict[str, Any]:
    """Colour and marker of a line by its number."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}


@contextmanager
def drawn(xlabel: str, ylabel: str, size: tuple[float, float] = SIZE) -> Iterator[tuple[Axes, io.BytesIO]]:
    """Axes to draw on; the SVG is there once the block has ended. ``size``: width and height in inches."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        svg = io.BytesIO()
        yield axes, svg
        figure.savefig(svg, format="svg", metadata={"Date": None})
