"""Figures about gates: allocations, sparsity, multipliers, and the evidence for each unit.

Draw and save them inside `with style():` of megaconsa.reporting.plot_style.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from numpy.typing import NDArray

from megaconsa.consa.allocation import Allocation
from megaconsa.reporting.metrics import Row, series
from megaconsa.reporting.plot_style import (
    COLUMN,
    FOURTH,
    FULL,
    GATES,
    HEIGHT,
    INK,
    PAPER,
    TABLE,
    THIRD,
    WINDOW,
    Drawing,
    draw_band,
    draw_curve,
    new_figure,
    style,
)

HISTORY_POINTS = 160
"""Largest number of steps in the history of the layers."""


def allocation_maps(
    probability: Sequence[Sequence[float]] | None,
    step: int | None,
    full: Sequence[Sequence[bool]] | None,
    origin: str,
    window: int | None,
) -> Drawing:
    """Draws maps of layers x KV heads, with layer 0 at the top, as in the model card.

    The learned P(z > 0) is beside the table. Either of them may be None.

    probability: (layers, kv_heads), or (layers, 1) if a layer is one unit.
    step: the step of `probability`.
    full: (layers, kv_heads), the table.
    origin: the title of the table.
    window: keys that a windowed head sees.
    """
    tables: list[tuple[str, NDArray[np.float64]]] = []
    if probability is not None:
        title = "P(z > 0)"
        if step is not None:
            title += f", step {step:,}"
        tables.append((title, np.array(probability, dtype=np.float64)))
    if full is not None:
        tables.append((origin, np.array(full, dtype=np.float64)))
    layers = len(tables[0][1])
    figure, axes = new_figure(COLUMN, _map_height(layers), len(tables))
    colours = TABLE if probability is None else GATES
    for axis, (title, table) in zip(axes, tables, strict=True):
        heads = table.shape[1]
        mesh = axis.pcolormesh(table, cmap=colours, vmin=0, vmax=1, edgecolors="none")
        _draw_gaps(axis, layers, heads)
        axis.set(title=title, xlabel="KV head" if heads > 1 else "all KV heads")
        _name_cells(axis.set_xticks, heads, 12 // len(axes))
        _name_cells(axis.set_yticks, layers)
        axis.set_xlim(0, heads)
        axis.set_ylim(layers, 0)
        axis.grid(False)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel("layer")
    narrow = "window" if window is None else f"window {window:,}"
    middle = "" if probability is None else "undecided"
    _draw_colour_bar(figure, mesh, axes, [narrow, middle, "full"])
    caption = "Blue is full attention, sand the window, grey undecided. "
    if probability is not None:
        caption += "At the end of learning, no unit should be grey."
    else:
        caption += "Each row is a layer of the model, the first one on top."
    return Drawing("Which heads are full", caption, figure)


def save_allocation(allocation: Allocation, path: Path) -> None:
    """Saves the map of a table as a separate image."""
    with style():
        title = f"sparsity {allocation.sparsity:.3g}"
        drawing = allocation_maps(None, None, allocation.full, title, allocation.window)
        drawing.figure.savefig(path, dpi=150, metadata={"Software": None})


def layer_history(rows: Sequence[Row]) -> Drawing | None:
    """Draws the expected sparsity of each layer over the steps. Returns None for fewer than two."""
    held = [row for row in rows if isinstance(row.get("layer_expected_sparsity"), list)]
    if len(held) < 2:
        return None
    count = min(len(held), HISTORY_POINTS)
    chosen = np.unique(np.linspace(0, len(held) - 1, count).astype(int))
    held = [held[index] for index in chosen]
    sparsities = np.array([row["layer_expected_sparsity"] for row in held], dtype=np.float64)
    full_share = 1 - sparsities.T  # (layers, steps)
    layers = len(full_share)
    figure, (axis,) = new_figure(COLUMN, _map_height(layers))
    image = axis.imshow(
        full_share,
        cmap=GATES,
        vmin=0,
        vmax=1,
        aspect="auto",
        extent=(held[0]["step"], held[-1]["step"], layers, 0),
        interpolation="none",
    )
    axis.set(xlabel="step", ylabel="layer")
    _name_cells(axis.set_yticks, layers)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    _draw_colour_bar(figure, image, [axis], ["all windows", "half", "all full"])
    caption = (
        "Which layers got windows, and when. With the controller evidence, layers stay alike "
        "until the last quarter of the steps, which decides."
    )
    return Drawing("Share of full attention expected in each layer", caption, figure)


def sparsity(rows: Sequence[Row]) -> Drawing:
    """Draws the target sparsity and the sparsities of the gates by several measures."""
    figure, (axis,) = new_figure(COLUMN, HEIGHT)
    draw_curve(axis, series(rows, "sampled_sparsity"), "sampled", THIRD, width=0.8)
    if any("threshold_sparsity" in row for row in rows):
        draw_curve(axis, series(rows, "threshold_sparsity"), "threshold", FOURTH, dash=":")
    draw_curve(axis, series(rows, "binarized_sparsity"), "binarised, top-k", WINDOW)
    draw_curve(axis, series(rows, "expected_sparsity"), "expected", FULL, width=2)
    draw_curve(axis, series(rows, "target_sparsity"), "target", INK, dash="--", width=1)
    axis.set(xlabel="step", ylabel="share of windowed units", ylim=(-0.02, 1.02))
    caption = (
        "Good: expected follows the target, and binarised ends at it. With paper, a gap between "
        "expected and threshold means that log_alpha > 0 would not meet the target."
    )
    return Drawing("Sparsity", caption, figure)


def multipliers(rows: Sequence[Row]) -> Drawing | None:
    """Draws lambda and phi. With one constraint per layer it draws their mean and range."""
    held = [row for row in rows if isinstance(row.get("multipliers"), dict)]
    if not held:
        return None
    # The controller evidence has no phi.
    kinds = []
    for kind in (("lambda", "λ", FULL), ("phi", "φ", WINDOW)):
        if any(kind[0] in row["multipliers"] for row in held):
            kinds.append(kind)
    figure, axes = new_figure(COLUMN, HEIGHT, len(kinds))
    steps = np.array([row["step"] for row in held], dtype=np.float64)
    constraints = 1
    for axis, (name, symbol, colour) in zip(axes, kinds, strict=True):
        found = [np.atleast_1d(row["multipliers"].get(name, np.nan)) for row in held]
        values = np.array(found, dtype=np.float64)  # (steps, constraints)
        draw_band(axis, steps, values, colour, symbol)
        constraints = values.shape[1]
        axis.set(title=symbol, xlabel="step")
    caption = "The price of a unit at the cut. Good: both settle before the end."
    if constraints > 1:
        caption += f" Line: mean over {constraints} constraints, band: their range."
    return Drawing("Multipliers", caption, figure)


def decided(rows: Sequence[Row]) -> Drawing:
    """Draws the share of units that are decided, and the gap between scores at the cut."""
    figure, axes = new_figure(COLUMN, HEIGHT, 2)
    draw_curve(axes[0], series(rows, "decided_share"), "decided share", FULL, width=2)
    axes[0].set(title="decided share", xlabel="step", ylim=(-0.02, 1.02))
    draw_curve(
        axes[1], series(rows, "cut_margin"), "gap between scores at the cut", WINDOW, width=2
    )
    axes[1].set(title="gap at the cut", xlabel="step")
    caption = (
        "Left: units with P(z = 0) or P(z = 1) above 0.9. It should reach 1, but noise reaches it "
        "too. Right: smallest gap between the scores of full and windowed units."
    )
    return Drawing("Decisions (no evidence by themselves)", caption, figure)


def evidence(rows: Sequence[Row]) -> Drawing:
    """Draws whether the order of the units would be found again, and how many it separates."""
    figure, (axis,) = new_figure(COLUMN, HEIGHT)
    draw_curve(axis, series(rows, "split_agreement"), "split agreement", FULL, width=2)
    draw_curve(axis, series(rows, "time_agreement"), "time agreement", THIRD)
    draw_curve(axis, series(rows, "separated_share"), "separated share", WINDOW, width=2)
    axis.axhline(0, color=INK, linewidth=0.6)
    # Agreement is a correlation, which is below 0 by chance or if the order turned around.
    lowest = float(axis.dataLim.y0)
    axis.set(xlabel="step", ylim=(min(-0.3, lowest - 0.05), 1.02))
    caption = (
        "Good: split agreement near 1, so that the same order of units would be found again. "
        "Near 0 the table is noise, whatever the other figures say. Separated share: units that "
        "are two standard errors from the cut."
    )
    return Drawing("Evidence: 0 is noise, 1 is certain", caption, figure)


def unit_evidence(
    scores: Sequence[Sequence[float]],
    errors: Sequence[Sequence[float | None]],
    full: Sequence[Sequence[bool]] | None,
) -> Drawing:
    """Draws every unit's score with two standard errors, in order.

    Units whose bars overlap cannot be told apart.

    scores, errors: (layers, units).
    full: (layers, KV heads), which colours the units if given.
    """
    values = np.array(scores, dtype=np.float64)
    if full is None:
        kept = np.ones(values.shape, dtype=bool)
    else:
        # If a layer is one unit, all its heads are alike and the first one is enough.
        kept = np.array(full)[:, : values.shape[1]]
    order = np.argsort(-values.ravel())
    sorted_values = values.ravel()[order]
    sorted_bars = 2 * np.array(errors, dtype=np.float64).ravel()[order]
    is_full = kept.ravel()[order]
    places = np.arange(1, values.size + 1)
    figure, (axis,) = new_figure(COLUMN, HEIGHT)
    for colour, label, chosen in ((FULL, "full", is_full), (WINDOW, "window", ~is_full)):
        axis.errorbar(
            places[chosen],
            sorted_values[chosen],
            sorted_bars[chosen],
            color=colour,
            label=label,
            fmt=".",
            markersize=4,
            elinewidth=0.8,
        )
    axis.axhline(0, color=INK, linewidth=0.6)
    scale = float(np.median(np.abs(values))) or 1.0
    axis.set_yscale("symlog", linthresh=scale)
    axis.yaxis.set_major_locator(FixedLocator(_symlog_ticks(*axis.get_ylim(), scale)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.set(xlabel="units in order", ylabel="nats per token")
    caption = (
        "Every unit with two standard errors. Good: the bars of full and windowed units do not "
        "overlap. Where they do, the table is a coin toss."
    )
    return Drawing("Loss that opening a unit saves", caption, figure)


def _symlog_ticks(low: float, high: float, linear: float) -> list[float]:
    """Returns 0 and powers of ten between `low` and `high`, none too near to 0.

    linear: the scale is linear between plus and minus this number.
    """
    first = math.ceil(math.log10(linear))
    last = math.floor(math.log10(max(abs(low), abs(high))))
    stride = max(1, (last - first + 1) // 2)
    powers = [10.0**power for power in range(first, last + 1, stride)]
    positive = powers or [linear]
    negative = [-tick for tick in reversed(positive)]
    return [tick for tick in (*negative, 0.0, *positive) if low <= tick <= high]


def _map_height(layers: int) -> float:
    """Height in inches of a map with this number of layers."""
    return max(3.0, 1.4 + 0.11 * layers)


def _draw_gaps(axis: Axes, layers: int, heads: int) -> None:
    """Draws lines in the background colour between the cells."""
    axis.hlines(np.arange(layers + 1), 0, heads, color=PAPER, linewidth=1.2)
    axis.vlines(np.arange(heads + 1), 0, layers, color=PAPER, linewidth=1.2)


def _name_cells(set_ticks: Any, count: int, most: int = 14) -> None:
    """Puts numbers at the middles of the cells, `most` at most."""
    stride = max(1, -(-count // most))
    set_ticks(np.arange(0, count, stride) + 0.5, [str(cell) for cell in range(0, count, stride)])


def _draw_colour_bar(
    figure: Figure,
    image: ScalarMappable,
    axes: Sequence[Axes],
    names: Sequence[str],
) -> None:
    """Draws a colour bar below the axes.

    names: labels of 0, 1/2 and 1.
    """
    bar = figure.colorbar(
        image,
        ax=list(axes),
        location="bottom",
        aspect=45,
        fraction=0.05,
        pad=0.03,
        shrink=0.7,
    )
    bar.set_ticks([0.0, 0.5, 1.0], labels=list(names))
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
