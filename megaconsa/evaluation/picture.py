"""Draws an evaluation as one picture: perplexity by position, needle heat maps, and tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray

from megaconsa.evaluation.record import Evaluation, NeedleCell
from megaconsa.reporting.plot_style import INK, RUN_COLOURS, style

FILE = "evaluation.png"
WIDTH = 10.0
"""Width of the picture, in inches."""
CURVES = 3.8
MAPS = 3.2
BARS = 2.8
"""Heights of the three kinds of rows, in inches."""
MAPS_IN_A_ROW = 4
Floats = NDArray[np.float64]


def save_picture(evaluation: Evaluation, path: Path) -> None:
    """Draws the parts that have been measured, and saves the picture to `path`."""
    colours = {}
    for index, label in enumerate(evaluation.models):
        colours[label] = RUN_COLOURS[index % len(RUN_COLOURS)]
    models = evaluation.models.values()
    searched = [model for model in models if model.needle]
    heights = []
    draws = []
    if any(model.perplexity for model in models):
        heights.append(CURVES)
        draws.append(_perplexity)
    if searched:
        heights.append(MAPS * math.ceil(len(searched) / MAPS_IN_A_ROW))
        draws.append(_needles)
    if any(model.harness for model in models):
        heights.append(BARS)
        draws.append(_tasks)
    with style():
        figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, draw in zip(parts, draws, strict=True):
            draw(part, evaluation, colours)
        figure.savefig(path, dpi=150, metadata={"Software": None})


def _perplexity(part: SubFigure, evaluation: Evaluation, colours: dict[str, str]) -> None:
    """Draws perplexity and, beside it, the losses minus those of the first model.

    Points are in the middle of each bucket, with bars of one standard error.
    """
    measured = {
        label: model.perplexity for label, model in evaluation.models.items() if model.perplexity
    }
    columns = 2 if evaluation.differences else 1
    axes: list[Axes] = part.subplots(1, columns, squeeze=False)[0].tolist()
    edges = next(iter(measured.values())).edges
    middles = np.arange(len(edges) - 1) + 0.5
    for label, result in measured.items():
        # The errors are those of the loss. The derivative of exp(loss) is exp(loss).
        loss_errors = np.array([error or 0 for error in result.standard_error])
        errors = np.array(result.perplexity) * loss_errors
        _points(axes[0], middles, result.perplexity, errors, colours[label], label)
    axes[0].set(title="Perplexity by position in the document")
    values = [value for result in measured.values() for value in result.perplexity]
    # On a narrower range, a logarithmic axis would have one tick or none.
    if max(values) > 5 * min(values):
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[0].yaxis.set_minor_locator(NullLocator())
    axes[0].yaxis.set_major_formatter("{x:,.4g}")
    for label, difference in evaluation.differences.items():
        errors = np.array([error or 0 for error in difference.standard_error])
        _points(axes[1], middles, difference.loss, errors, colours[label], label)
    if evaluation.differences:
        base = next(iter(evaluation.models))
        axes[1].axhline(0, color=colours[base], linewidth=1.5)
        axes[1].set(title=f"Loss less that of {base}, nats a token")
    for axis in axes:
        axis.set(xlabel="position", xlim=(0, len(edges) - 1))
        stride = 1 if len(edges) < 10 else 2
        axis.set_xticks(range(0, len(edges), stride), [f"{edge:,}" for edge in edges[::stride]])
        _windows(axis, evaluation, edges)
    axes[0].legend(ncols=2)


def _points(
    axis: Axes, x: Floats, values: Sequence[float], errors: Floats, colour: str, label: str
) -> None:
    axis.errorbar(x, values, errors, color=colour, marker="o", markersize=4, label=label)


def _windows(axis: Axes, evaluation: Evaluation, edges: Sequence[int]) -> None:
    """Marks the windows of all models. From there on, windowed heads see less than full ones."""
    where: dict[str, Any] = {
        "xycoords": ("data", "axes fraction"),
        "xytext": (3, 4),
        "textcoords": "offset points",
    }
    windows = {model.window for model in evaluation.models.values() if model.window is not None}
    for window in sorted(windows):
        if window < edges[-1]:
            x = _place(window, edges)
            axis.axvline(x, color=INK, linewidth=1, linestyle="--", alpha=0.6)
            axis.annotate(f"window {window:,}", (x, 0), **where, fontsize=8.5)


def _place(position: int, edges: Sequence[int]) -> float:
    """Returns the place of a position on an axis on which all buckets are equally wide.

    The axis is logarithmic within each bucket except the first, which begins at 0.
    """
    bucket = int(np.searchsorted(edges, position, side="right")) - 1
    begin = edges[bucket]
    end = edges[bucket + 1]
    if begin == 0:
        return bucket + position / end
    return bucket + math.log(position / begin) / math.log(end / begin)


def _needles(part: SubFigure, evaluation: Evaluation, colours: dict[str, str]) -> None:
    """Draws a heat map of depths x lengths for each model.

    The colour is the margin, and the number is the share of exact answers.
    """
    measured = {label: model.needle for label, model in evaluation.models.items() if model.needle}
    columns = min(len(measured), MAPS_IN_A_ROW)
    rows = math.ceil(len(measured) / columns)
    axes: list[Axes] = part.subplots(rows, columns, squeeze=False).flatten().tolist()
    # All maps share one scale of colours.
    margins = [cell.margin for cells in measured.values() for cell in cells]
    low = min(0.0, *margins)
    high = max(1.0, *margins)
    for axis in axes[len(measured) :]:
        axis.set_visible(False)
    for axis, (label, cells) in zip(axes, measured.items(), strict=False):
        mesh = axis.pcolormesh(
            _grid(cells), cmap="Blues", vmin=low, vmax=high, edgecolors="white", linewidth=1
        )
        lengths, depths = _sides(cells)
        for cell in cells:
            column = lengths.index(cell.length)
            row = depths.index(cell.depth)
            is_dark = cell.margin - low > 0.6 * (high - low)
            ink = "white" if is_dark else INK
            text = f"{100 * cell.exact_match:.0f} %"
            axis.text(
                column + 0.5, row + 0.5, text, ha="center", va="center", color=ink, fontsize=8
            )
        axis.set(title=label, xlabel="tokens", ylabel="depth")
        axis.invert_yaxis()  # the beginning of the text is on top
        axis.set_xticks(np.arange(len(lengths)) + 0.5, [f"{length:,}" for length in lengths])
        axis.set_yticks(np.arange(len(depths)) + 0.5, [f"{depth:g}" for depth in depths])
        axis.grid(False)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    part.colorbar(mesh, ax=axes, label="nats gained by the needle").outline.set_visible(False)
    part.suptitle(
        "Needles: colour is the gain, numbers the exact answers",
        x=0.01,
        ha="left",
        fontweight="bold",
        fontsize=10.5,
    )


def _sides(cells: list[NeedleCell]) -> tuple[list[int], list[float]]:
    """Returns the lengths and the depths of the cells, in ascending order."""
    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells})
    return lengths, depths


def _grid(cells: list[NeedleCell]) -> Floats:
    """Returns the margins, (depths, lengths)."""
    lengths, depths = _sides(cells)
    grid = np.full((len(depths), len(lengths)), np.nan)
    for cell in cells:
        grid[depths.index(cell.depth), lengths.index(cell.length)] = cell.margin
    return grid


def _tasks(part: SubFigure, evaluation: Evaluation, colours: dict[str, str]) -> None:
    """Draws the first metric of each task, with a bar of one standard error."""
    axis = part.subplots()
    measured = {label: model.harness for label, model in evaluation.models.items() if model.harness}
    # The name of the first metric of each task, from the first model that has the task.
    names: dict[str, str] = {}
    for results in measured.values():
        for task, metrics in results.items():
            if metrics and task not in names:
                names[task] = next(iter(metrics))
    tasks = list(names)
    width = 0.8 / len(measured)
    for number, (label, results) in enumerate(measured.items()):
        # A task that the model lacks has no bar.
        values = [np.nan] * len(tasks)
        errors = [0.0] * len(tasks)
        for index, task in enumerate(tasks):
            metric = results.get(task, {}).get(names[task])
            if metric is None:
                continue
            if metric.value is not None:
                values[index] = metric.value
            if metric.standard_error is not None:
                errors[index] = metric.standard_error
        places = np.arange(len(tasks)) + (number + 0.5) * width - 0.4
        axis.bar(places, values, width, yerr=errors, color=colours[label], label=label)
    axis.set_xticks(range(len(tasks)), [f"{task}\n{names[task]}" for task in tasks])
    axis.set(title="Tasks")
    axis.grid(axis="x", visible=False)
    axis.set_axisbelow(True)
    axis.legend(ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
