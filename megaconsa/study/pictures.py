"""Figures of a study, in the style of megaconsa.reporting.plot_style.

Draw and save them inside its `style()`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from megaconsa.reporting.plot_style import FOURTH, FULL, GATES, INK, PAPER
from megaconsa.study.results import ResultRow

ROW_INCHES = 0.3
"""Height of an arm in a dot plot."""
MAPS_IN_A_ROW = 6


def dot_plot(rows: Sequence[ResultRow], title: str) -> Figure | None:
    """Draws each arm's difference to dense with its interval, the smallest at the top.

    The scale is linear up to the median difference and logarithmic beyond it, because the
    differences of bad rules are a hundred times those of good arms.

    Returns None if no arm has a difference.
    """
    compared = [row for row in rows if row.difference is not None]
    if not compared:
        return None
    compared.sort(key=lambda row: row.difference.mean if row.difference else 0.0, reverse=True)
    figure = Figure(figsize=(8.2, 1.5 + ROW_INCHES * len(compared)), layout="constrained")
    axis = figure.subplots()
    means = []
    for place, row in enumerate(compared):
        interval = row.difference
        assert interval is not None
        means.append(interval.mean)
        colour = FULL if interval.over == "runs" else FOURTH
        if interval.low is not None and interval.high is not None:
            axis.hlines(place, interval.low, interval.high, color=colour, linewidth=2.2, alpha=0.55)
        axis.plot(interval.mean, place, marker="o", markersize=6, color=colour)
        axis.annotate(
            f"{interval.mean:+.4f}",
            (interval.mean, place),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
        )
    axis.axvline(0, color=INK, linewidth=0.8)
    threshold = max(1e-3, float(np.median(np.abs(means))))
    axis.set_xscale("symlog", linthresh=threshold)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_yticks(range(len(compared)), [row.arm for row in compared])
    axis.set_ylim(-0.6, len(compared) - 0.2)
    axis.set(title=title, xlabel="validation loss over dense, nats a token")
    axis.tick_params(axis="y", length=0)
    # Empty curves name the colours in the legend. A point would look like data.
    axis.plot([], [], color=FULL, label="interval over runs")
    axis.plot([], [], color=FOURTH, label="interval over held-out sequences")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def allocation_maps(rows: Sequence[ResultRow]) -> Figure:
    """Draws small maps of layers x KV heads, with layer 0 at the top, one map per arm.

    They show how often each head is full over the trials of the arm.
    """
    # Rounded up.
    lines = -(-len(rows) // MAPS_IN_A_ROW)
    layers = len(rows[0].full_share)
    height = lines * (0.75 + 0.085 * layers)
    figure = Figure(figsize=(11.2, height), layout="constrained")
    axes = figure.subplots(lines, MAPS_IN_A_ROW, squeeze=False).ravel().tolist()
    for axis in axes[len(rows) :]:
        axis.set_visible(False)
    for axis, row in zip(axes, rows, strict=False):
        shares = np.array(row.full_share)
        axis.pcolormesh(shares, cmap=GATES, vmin=0, vmax=1, edgecolors=PAPER, linewidth=0.6)
        axis.invert_yaxis()
        axis.set_title(row.arm, fontsize=8.5, fontweight="normal")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    return figure
