"""The shared style of all figures: colours, matplotlib settings, curves and axes, and SVG output.

A figure becomes SVG text that takes its text and background colours from the page, so that one file
serves light and dark. Draw and save figures inside `with style():`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

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
FOURTH = "#bf42a6"
RUN_COLOURS = (
    *(FULL, WINDOW, THIRD, "#bf1c1c", FOURTH),
    *("#725672", "#c3a2d8", "#d8684b", "#7442bf", "#8c7769"),
)
"""Colours of runs and models. tests/reporting/test_plot_style.py holds how far apart they are."""
RUN_DASHES = ("-", "--", ":", "-.")
"""Once all colours are used, they begin again with the next kind of line."""
GATES = LinearSegmentedColormap.from_list("gates", [WINDOW, "#a9adb5", FULL])
"""0 is the window, 1 is full attention, and grey is undecided."""
TABLE = ListedColormap([WINDOW, FULL])
COLUMN = 4.2
"""Width in inches of a figure that is readable on a phone. A wide page shows three in a row."""
WIDE = 13.4
"""Width in inches of a figure that spans a wide page."""
HEIGHT = 2.5
"""Height in inches of most figures."""
PIXELS_PER_INCH = 150
"""Of pictures that are not SVG."""
POINTS = 400
"""Largest number of points of a curve. More rows are drawn as the mean and range of groups."""

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "megaconsa",  # the same run gives the same file
    "path.simplify": False,  # the page reads a curve's points from its path
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
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


@dataclass(frozen=True)
class Drawing:
    """A figure with the words around it."""

    title: str
    caption: str
    """How to read it, and what good looks like."""
    figure: Figure
    narrow: Figure | None = None
    """The same for a phone, if `figure` spans a wide page."""


def style() -> AbstractContextManager[None]:
    """Returns the context in which every figure is drawn and saved."""
    return matplotlib.rc_context(STYLE)  # type: ignore[arg-type]  # the stubs want literal keys


def run_line(number: int) -> tuple[str, str]:
    """Returns the colour and the kind of line of a run. They differ for the first 40."""
    colours = len(RUN_COLOURS)
    dash = RUN_DASHES[number // colours % len(RUN_DASHES)]
    return RUN_COLOURS[number % colours], dash


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Returns a figure and its axes, without pyplot's global state.

    width, height: in inches.
    columns: number of axes, side by side.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0].tolist()
    ticks = max(3, int(width / columns / 0.8))
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(min(ticks, 10), integer=True))
    return figure, axes


def draw_curve(
    axis: Axes,
    points: tuple[NDArray[np.float64], NDArray[np.float64]],
    label: str,
    colour: str,
    *,
    dash: str = "-",
    width: float = 1.5,
    smooth: int = 1,
    shows_noise: bool = True,
) -> None:
    """Draws a curve, or nothing if it has no points.

    A curve of more than POINTS points is drawn as the mean of groups, in a band of their range.

    points: x and y, each (points,).
    smooth: number of points of the moving average.
    shows_noise: draws the values themselves, or their band, faintly behind the mean.
    """
    steps, raw = points
    if not len(steps):
        return
    values = moving_average(raw, smooth)
    if len(steps) > POINTS:
        groups = np.array_split(np.arange(len(steps)), POINTS)
        low = np.array([raw[group].min() for group in groups])
        high = np.array([raw[group].max() for group in groups])
        steps = np.array([steps[group].mean() for group in groups])
        values = np.array([values[group].mean() for group in groups])
        if shows_noise:
            axis.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    elif smooth > 1 and shows_noise:
        axis.plot(steps, raw, color=colour, linestyle=dash, linewidth=0.7, alpha=0.35)
    # A line through a single point is invisible.
    marker = "o" if len(steps) == 1 else ""
    axis.plot(
        steps,
        values,
        color=colour,
        linestyle=dash,
        linewidth=width,
        marker=marker,
        label=label,
    )


def moving_average(values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Returns the mean of `count` values around each, and of fewer near the ends.

    The values on both sides of one are equally many, so that a slope stays where it is.
    """
    if count < 2 or len(values) < 3:
        return values
    places = np.arange(len(values))
    reach = np.minimum(count // 2, np.minimum(places, len(values) - 1 - places))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    means: NDArray[np.float64] = (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)
    return means


def draw_band(
    axis: Axes,
    steps: NDArray[np.float64],
    values: NDArray[np.float64],
    colour: str,
    label: str,
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
    axis.plot(steps, values.mean(axis=1), color=colour, linewidth=2, label=label)


def log_scale(axis: Axes) -> None:
    """Makes the y axis logarithmic, with at least two ticks. Call it once the curves are drawn."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(FixedLocator(log_ticks(low, high)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylim(low, high)


def log_ticks(low: float, high: float) -> list[float]:
    """Returns two to eight round numbers between two positive ones."""
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5)):
        ticks = [digit * 10.0**power for power in powers for digit in digits]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 3:
            stride = -(-len(inside) // 8)
            return inside[::stride]
    # The range is so narrow that it is nearly linear.
    linear = MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [float(tick) for tick in linear if low <= tick <= high]


def legend(figure: Figure) -> list[tuple[str, str, str]]:
    """Returns label, colour and kind of line of every labelled curve. Empty if there is only one.

    It is also empty if the curves have axes of their own, which name them. The page shows legends
    above the figures, where no curve can cross them.
    """
    axes = [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]
    if len(axes) > 1:
        return []
    found: dict[str, tuple[str, str, str]] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            line = handle[0] if isinstance(handle, Sequence) else handle
            dash = line.get_linestyle() if hasattr(line, "get_linestyle") else "-"
            colour = matplotlib.colors.to_hex(_colour(line)).replace(INK, "currentColor")
            found.setdefault(label, (label, colour, str(dash)))
    if len(found) < 2:
        return []
    return list(found.values())


def _colour(line: Any) -> Any:
    return line.get_color() if hasattr(line, "get_color") else line.get_facecolor()


def to_pixels(figure: Figure) -> NDArray[np.uint8]:
    """Returns the figure on white as red, green and blue, (height, width, 3)."""
    figure.set_dpi(PIXELS_PER_INCH)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels: NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())[:, :, :3].copy()
    return pixels


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
    # Ids would be the same in every figure of a page. The page's script looks for these classes.
    text = re.sub(r' id="(axes|xtick|ytick)_\d+"', r' class="\1"', text)
    text = re.sub(r' id="curve_([\d.]+)"', r' class="curve" data-curve="\1"', text)
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)
    # The font is the page's.
    text = re.sub(r" ?font-family: [^;\"]*;", "", text)
    return text.replace(INK, "currentColor").replace(PAPER, "var(--paper)")
