"""The shared style of all figures: colours, matplotlib settings, curves and axes, and SVG output.

A figure becomes SVG text that takes its text and background colours from the page, so that one file
serves light and dark. Draw and save figures inside `with style():`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from megaconsa.reporting.metrics import Row, series

INK = "#010203"
"""Placeholder for the page's text colour while matplotlib draws."""
PAPER = "#fefdfc"
"""Placeholder for the page's background colour while matplotlib draws."""
# Colour-blind readers can tell these four apart, and all are legible on white and on near-black.
FULL = "#3b7ddd"
"""Full attention."""
WINDOW = "#e2a33b"
"""Sliding window."""
THIRD = "#2ba889"
FOURTH = "#d1607e"
RUN_COLOURS = (FULL, WINDOW, THIRD, FOURTH, "#8a6fd1", "#7a8aa0")
GATES = LinearSegmentedColormap.from_list("gates", [WINDOW, "#a9adb5", FULL])
"""0 is the window, 1 is full attention, and grey is undecided."""
TABLE = ListedColormap([WINDOW, FULL])
HALF = 6.0
"""Width in inches of figures that are two in a row."""
NARROW = 4.0
"""Width in inches of figures that are three in a row."""
POINTS = 400
"""Largest number of points of a curve. More rows are drawn as the mean and range of groups."""

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "megaconsa",  # the same run gives the same file
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
}


def style() -> AbstractContextManager[None]:
    """Returns the context in which every figure is drawn and saved."""
    return matplotlib.rc_context(STYLE)  # type: ignore[arg-type]  # the stubs want literal keys


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Returns a figure and its axes, without pyplot's global state.

    width, height: in inches.
    columns: number of axes, side by side.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0].tolist()
    ticks = 6 if columns == 1 else 4
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))
    return figure, axes


def with_legend(figure: Figure, axis: Axes) -> Figure:
    """Adds a legend if there is more than one labelled curve. Returns the figure."""
    handles, _ = axis.get_legend_handles_labels()
    if len(handles) > 1:
        axis.legend(ncols=min(len(handles), 3), handlelength=1.6, columnspacing=1.2)
    return figure


def draw_curve(
    axis: Axes,
    rows: Sequence[Row],
    name: str,
    label: str,
    colour: str,
    *,
    style: str = "-",
    width: float = 1.5,
    alpha: float = 1.0,
    x: str = "step",
) -> None:
    """Draws a field of the rows over the field `x`, or nothing if no row has it.

    A curve of more than POINTS points is drawn as the mean of groups, in a band of their range.
    """
    steps, values = series(rows, name, x)
    if not len(steps):
        return
    if len(steps) > POINTS:
        groups = np.array_split(np.arange(len(steps)), POINTS)
        low = np.array([values[group].min() for group in groups])
        high = np.array([values[group].max() for group in groups])
        steps = np.array([steps[group].mean() for group in groups])
        values = np.array([values[group].mean() for group in groups])
        axis.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    # A line through a single point is invisible.
    marker = "o" if len(steps) == 1 else ""
    axis.plot(
        steps,
        values,
        color=colour,
        linestyle=style,
        linewidth=width,
        alpha=alpha,
        marker=marker,
        label=label or None,
    )


def draw_band(
    axis: Axes,
    steps: NDArray[np.float64],
    values: NDArray[np.float64],
    colour: str,
) -> None:
    """Draws the mean and the range over the columns of `values`.

    steps: (steps,). values: (steps, constraints).
    """
    if len(steps) > POINTS:
        chosen = np.linspace(0, len(steps) - 1, POINTS).astype(int)
        steps = steps[chosen]
        values = values[chosen]
    if values.shape[1] > 1:
        low = values.min(axis=1)
        high = values.max(axis=1)
        axis.fill_between(steps, low, high, color=colour, alpha=0.25, linewidth=0)
    axis.plot(steps, values.mean(axis=1), color=colour, linewidth=2)


def to_svg(figure: Figure) -> str:
    """Returns the figure as an inline <svg> element.

    It uses currentColor for the ink. It has no metadata and no namespaces, and only the ids that
    it refers to.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)
    text = re.sub(r"font: ([^;\"]*?)'[^;\"]*sans-serif", r"font: \1sans-serif", text)
    return text.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
