"""An evaluation as one picture: perplexity against position, needle heat maps side by side, tasks."""

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
from megaconsa.reporting.plots import INK, RUN_COLOURS, style

FILE = "evaluation.png"
WIDTH, CURVES, MAPS, BARS = 10.0, 3.8, 3.2, 2.8
"""Inches: of all, and heights of the three rows."""
MAPS_IN_A_ROW = 4
Floats = NDArray[np.float64]


def save_picture(evaluation: Evaluation, path: Path) -> None:
    """Draws what has been measured."""
    colours = {
        label: RUN_COLOURS[i % len(RUN_COLOURS)] for i, label in enumerate(evaluation.models)
    }
    models = evaluation.models.values()
    searched = [model for model in models if model.needle]
    rows = [
        (CURVES, _perplexity, any(model.perplexity for model in models)),
        (MAPS * -(-len(searched) // MAPS_IN_A_ROW), _needles, bool(searched)),
        (BARS, _tasks, any(model.harness for model in models)),
    ]
    heights, draws = zip(
        *((height, draw) for height, draw, measured in rows if measured), strict=True
    )
    with style():
        figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, draw in zip(parts, draws, strict=True):
            draw(part, evaluation, colours)
        figure.savefig(path, dpi=150, metadata={"Software": None})


def _perplexity(part: SubFigure, evaluation: Evaluation, colours: dict[str, str]) -> None:
    """Points in the middle of each bucket with bars of one standard error: perplexity, and losses less the first model's."""
    measured = {
        label: model.perplexity for label, model in evaluation.models.items() if model.perplexity
    }
    axes: list[Axes] = part.subplots(1, 2 if evaluation.differences else 1, squeeze=False)[
        0
    ].tolist()
    edges = next(iter(measured.values())).edges
    middles = np.arange(len(edges) - 1) + 0.5
    for label, result in measured.items():
        errors = np.array(result.perplexity) * np.array(
            [error or 0 for error in result.standard_error]
        )
        _points(axes[0], middles, result.perplexity, errors, colours[label], label)
    axes[0].set(title="Perplexity by position in the document")
    values = [value for result in measured.values() for value in result.perplexity]
    if max(values) > 5 * min(
        values
    ):  # on a narrower range a logarithmic axis would have one tick or none
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
    """From a window's place on, windowed heads see less than full ones."""
    for window in sorted(
        {model.window for model in evaluation.models.values() if model.window is not None}
    ):
        if window < edges[-1]:
            x = _place(window, edges)
            axis.axvline(x, color=INK, linewidth=1, linestyle="--", alpha=0.6)
            where: dict[str, Any] = {
                "xycoords": ("data", "axes fraction"),
                "xytext": (3, 4),
                "textcoords": "offset points",
            }
            axis.annotate(f"window {window:,}", (x, 0), **where, fontsize=8.5)


def _place(position: int, edges: Sequence[int]) -> float:
    """Where a position stands on an axis on which all buckets are equally wide: logarithmic within each but the first."""
    bucket = int(np.searchsorted(edges, position, side="right")) - 1
    begin, end = edges[bucket], edges[bucket + 1]
    return bucket + (
        math.log(position / begin) / math.log(end / begin) if begin else position / end
    )


def _needles(part: SubFigure, evaluation: Evaluation, colours: dict[str, str]) -> None:
    """Depths x lengths for each model; the colour is the margin, the number the share of exact answers."""
    measured = {label: model.needle for label, model in evaluation.models.items() if model.needle}
    columns = min(len(measured), MAPS_IN_A_ROW)
    axes: list[Axes] = (
        part.subplots(-(-len(measured) // columns), columns, squeeze=False).flatten().tolist()
    )
    margins = [cell.margin for cells in measured.values() for cell in cells]
    low, high = min(0.0, *margins), max(1.0, *margins)
    for axis in axes[len(measured) :]:
        axis.set_visible(False)
    for axis, (label, cells) in zip(axes, measured.items(), strict=False):
        mesh = axis.pcolormesh(
            _grid(cells), cmap="Blues", vmin=low, vmax=high, edgecolors="white", linewidth=1
        )
        lengths, depths = _sides(cells)
        for cell in cells:
            column, row = lengths.index(cell.length), depths.index(cell.depth)
            ink = "white" if cell.margin - low > 0.6 * (high - low) else INK
            text = f"{100 * cell.exact_match:.0f} %"
            axis.text(
                column + 0.5, row + 0.5, text, ha="center", va="center", color=ink, fontsize=8
            )
        axis.set(title=label, xlabel="tokens", ylabel="depth")
        axis.invert_yaxis()  # the beginning of the text on top
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
    return sorted({cell.length for cell in cells}), sorted({cell.depth for cell in cells})


def _grid(cells: list[NeedleCell]) -> Floats:
    """(depths, lengths) margins."""
    lengths, depths = _sides(cells)
    grid = np.full((len(depths), len(lengths)), np.nan)
    for cell in cells:
        grid[depths.index(cell.depth), lengths.index(cell.length)] = cell.margin
    return grid


def _tasks(part: SubFigure, evaluation: Evaluation, colours: dict[str, str]) -> None:
    """The first metric of each task, with a bar of one standard error."""
    axis = part.subplots()
    measured = {label: model.harness for label, model in evaluation.models.items() if model.harness}
    tasks = list(
        {
            task: None
            for results in measured.values()
            for task, metrics in results.items()
            if metrics
        }
    )
    names = {
        task: next(iter(next(r[task] for r in measured.values() if r.get(task)))) for task in tasks
    }
    width = 0.8 / len(measured)
    for number, (label, results) in enumerate(measured.items()):
        metrics = [results.get(task, {}).get(names[task]) for task in tasks]
        values = [
            np.nan if metric is None or metric.value is None else metric.value for metric in metrics
        ]
        errors = [metric.standard_error or 0.0 if metric else 0.0 for metric in metrics]
        places = np.arange(len(tasks)) + (number + 0.5) * width - 0.4
        axis.bar(places, values, width, yerr=errors, color=colours[label], label=label)
    axis.set_xticks(range(len(tasks)), [f"{task}\n{names[task]}" for task in tasks])
    axis.set(title="Tasks")
    axis.grid(axis="x", visible=False)
    axis.set_axisbelow(True)
    axis.legend(ncols=4, loc="lower right", bbox_to_anchor=(1, 1))
