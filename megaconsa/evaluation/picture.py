"""Draws an evaluation: losses by position, needle heat maps, and tasks.

`save_picture` puts everything into one picture. The report takes the parts one by one. Models are
told apart by the colour, the kind of line and the marker, and their points are a little apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from megaconsa.evaluation.record import Evaluation, NeedleCell, Perplexity
from megaconsa.reporting.plot_style import FULL, INK, WINDOW, log_scale, run_line, style

FILE = "evaluation.png"
WIDTH = 10.0
"""Width of the picture, in inches."""
MARGIN = 0.11
"""Space around each part, in inches."""
CURVES = 3.8
MAPS = 3.2
BARS = 2.8
"""Heights of the three kinds of rows, in inches."""
MAPS_IN_A_ROW = 4
MARKERS = "osD^vP*X"
APART = 0.14
"""Distance between the points of two models, in buckets."""
WIDEST = 0.6
"""Largest distance between the points of the first and the last model, in buckets."""
GAIN = LinearSegmentedColormap.from_list("gain", [WINDOW, "#f7f7f7", FULL])
"""Sand where the needle misleads, white where it does nothing, blue where it helps."""
CELL_INK = "#111418"
"""Text on GAIN's colours, which are the same on white pages and on dark ones."""
LABEL_INCHES = 0.5
"""Room for the name of a position."""
LOG_RATIO = 5.0
"""Perplexities are drawn on a logarithmic axis if the largest is this many times the smallest."""
Floats = NDArray[np.float64]


def save_picture(evaluation: Evaluation, path: Path) -> None:
    """Draws the parts that have been measured, and saves the picture to `path`."""
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
        layout = ConstrainedLayoutEngine(w_pad=MARGIN, h_pad=MARGIN)
        figure = Figure(figsize=(WIDTH, sum(heights)), layout=layout)
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, draw in zip(parts, draws, strict=True):
            draw(part, evaluation)
        figure.savefig(path, dpi=150, metadata={"Software": None})


def _perplexity(part: SubFigure, evaluation: Evaluation) -> None:
    """Draws perplexity and, beside it, the losses minus those of the first model."""
    columns = 2 if evaluation.differences else 1
    axes: list[Axes] = part.subplots(1, columns, squeeze=False)[0].tolist()
    draw_perplexity(axes[0], evaluation)
    axes[0].set_title("Perplexity by position in the document")
    if evaluation.differences:
        draw_differences(axes[1], evaluation)
        base = next(iter(evaluation.models))
        axes[1].set_title(f"Loss minus that of {base}, nats per token")
    handles, labels = axes[0].get_legend_handles_labels()
    # Below the axes, where no curve can cross it.
    part.legend(handles, labels, loc="outside lower center", ncols=4)


def draw_perplexity(axis: Axes, evaluation: Evaluation) -> None:
    """Draws perplexity by position, with bars of one standard error."""
    measured = _measured(evaluation)
    edges = next(iter(measured.values())).edges
    for label, result in measured.items():
        # The errors are those of the loss. The derivative of exp(loss) is exp(loss).
        loss_errors = np.array([error or 0 for error in result.standard_error])
        errors = np.array(result.perplexity) * loss_errors
        _points(axis, evaluation, label, result.perplexity, errors)
    values = [value for result in measured.values() for value in result.perplexity]
    axis.yaxis.set_major_formatter("{x:,.4g}")
    _positions(axis, evaluation, edges)
    if max(values) > LOG_RATIO * min(values):
        log_scale(axis)
        axis.yaxis.set_major_formatter("{x:,.4g}")


def draw_differences(axis: Axes, evaluation: Evaluation) -> None:
    """Draws the losses minus those of the first model, with bars of one standard error."""
    for label, difference in evaluation.differences.items():
        errors = np.array([error or 0 for error in difference.standard_error])
        _points(axis, evaluation, label, difference.loss, errors)
    base = next(iter(evaluation.models))
    colour, _, _ = _look(evaluation, base)
    axis.axhline(0, color=colour, linewidth=1.5)
    edges = next(iter(_measured(evaluation).values())).edges
    _positions(axis, evaluation, edges)


def _measured(evaluation: Evaluation) -> dict[str, Perplexity]:
    return {
        label: model.perplexity for label, model in evaluation.models.items() if model.perplexity
    }


def _look(evaluation: Evaluation, label: str) -> tuple[str, str, str]:
    """Returns colour, kind of line and marker of a model."""
    number = list(evaluation.models).index(label)
    colour, dash = run_line(number)
    return colour, dash, MARKERS[number % len(MARKERS)]


def _points(
    axis: Axes, evaluation: Evaluation, label: str, values: Sequence[float], errors: Floats
) -> None:
    """Draws a value for each bucket, near its middle. The models are side by side there."""
    number = list(evaluation.models).index(label)
    count = len(evaluation.models)
    apart = min(APART, WIDEST / max(1, count - 1))
    shift = apart * (number - (count - 1) / 2)
    places = np.arange(len(values)) + 0.5 + shift
    colour, dash, marker = _look(evaluation, label)
    axis.plot(
        places,
        values,
        color=colour,
        linestyle=dash,
        linewidth=1,
        marker=marker,
        markersize=4.5,
        label=label,
    )
    axis.errorbar(places, values, errors, color=colour, fmt="none", elinewidth=1.2, capsize=2)


def _positions(axis: Axes, evaluation: Evaluation, edges: Sequence[int]) -> None:
    """Names the buckets, and marks the windows."""
    axis.set(xlabel="position", xlim=(-0.1, len(edges) - 0.9))
    axis.margins(y=0.12)
    figure = axis.get_figure(root=True)
    assert figure is not None
    wide = axis.get_window_extent().width / figure.dpi
    stride = max(1, math.ceil(len(edges) * LABEL_INCHES / max(wide, 1.0)))
    axis.set_xticks(range(0, len(edges), stride), [f"{edge:,}" for edge in edges[::stride]])
    _windows(axis, evaluation, edges)


def _windows(axis: Axes, evaluation: Evaluation, edges: Sequence[int]) -> None:
    """Marks the windows of all models. From there on, windowed heads see less than full ones."""
    where: dict[str, Any] = {
        "xycoords": ("data", "axes fraction"),
        "xytext": (3, -10),
        "textcoords": "offset points",
    }
    windows = {model.window for model in evaluation.models.values() if model.window is not None}
    for window in sorted(windows):
        if window < edges[-1]:
            x = _place(window, edges)
            axis.axvline(x, color=INK, linewidth=1, linestyle="--", alpha=0.6)
            axis.annotate(f"window {window:,}", (x, 1), **where, fontsize=8.5)


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


def _needles(part: SubFigure, evaluation: Evaluation) -> None:
    """Draws a heat map of depths x lengths for each model."""
    measured = {label: model.needle for label, model in evaluation.models.items() if model.needle}
    columns = min(len(measured), MAPS_IN_A_ROW)
    rows = math.ceil(len(measured) / columns)
    axes: list[Axes] = part.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis in axes[len(measured) :]:
        axis.set_visible(False)
    largest = largest_gain(evaluation)
    for axis, (label, cells) in zip(axes, measured.items(), strict=False):
        mesh = draw_needle_map(axis, cells, largest)
        axis.set_title(label)
    draw_gain_bar(part, mesh, axes, largest)
    part.suptitle(
        "Needles: colour is the gain, numbers the exact answers",
        x=0.01,
        ha="left",
        fontweight="bold",
        fontsize=10.5,
    )


def largest_gain(evaluation: Evaluation) -> float:
    """Returns the largest gain or loss by a needle, in nats. All maps share one scale."""
    cells = [cell for model in evaluation.models.values() for cell in model.needle or []]
    return max(1.0, *(abs(cell.margin) for cell in cells))


def draw_needle_map(axis: Axes, cells: list[NeedleCell], largest: float) -> QuadMesh:
    """Draws a heat map of depths x lengths.

    The colour is the margin, and the number is the share of exact answers.

    largest: the margin in nats at the ends of the scale.
    """
    mesh = axis.pcolormesh(
        _grid(cells), cmap=GAIN, vmin=-largest, vmax=largest, edgecolors="white", linewidth=1
    )
    lengths, depths = _sides(cells)
    for cell in cells:
        column = lengths.index(cell.length)
        row = depths.index(cell.depth)
        text = f"{100 * cell.exact_match:.0f} %"
        axis.text(
            column + 0.5, row + 0.5, text, ha="center", va="center", color=CELL_INK, fontsize=8
        )
    axis.set(xlabel="tokens", ylabel="depth")
    axis.invert_yaxis()  # the beginning of the text is on top
    axis.set_xticks(np.arange(len(lengths)) + 0.5, [f"{length:,}" for length in lengths])
    axis.set_yticks(np.arange(len(depths)) + 0.5, [f"{depth:g}" for depth in depths])
    axis.grid(False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return mesh


def draw_gain_bar(
    part: Figure | SubFigure,
    mesh: QuadMesh,
    axes: Sequence[Axes],
    largest: float,
    location: Literal["right", "bottom"] = "right",
) -> None:
    """Draws the scale of the gain, with a line at zero."""
    bar = part.colorbar(mesh, ax=list(axes), location=location)
    bar.set_label("nats gained by the needle")
    bar.set_ticks([-largest, 0, largest], labels=[f"-{largest:.3g}", "0", f"+{largest:.3g}"])
    line = bar.ax.axvline if location == "bottom" else bar.ax.axhline
    line(0, color=CELL_INK, linewidth=1.2)
    bar.outline.set_visible(False)


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


def _tasks(part: SubFigure, evaluation: Evaluation) -> None:
    axis = part.subplots()
    draw_tasks(axis, evaluation)
    axis.set_title("Tasks")
    handles, labels = axis.get_legend_handles_labels()
    part.legend(handles, labels, loc="outside lower center", ncols=4)


def draw_tasks(axis: Axes, evaluation: Evaluation) -> None:
    """Draws the first metric of each task, with a bar of one standard error."""
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
        colour, _, _ = _look(evaluation, label)
        axis.bar(places, values, width, yerr=errors, color=colour, ecolor=INK, label=label)
    axis.set_xticks(range(len(tasks)), [f"{task}\n{names[task]}" for task in tasks])
    axis.grid(axis="x", visible=False)
    axis.set_axisbelow(True)
