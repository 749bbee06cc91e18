"""Figures of a run, as SVG text that takes its ink from the page, so that one file serves light and dark.

Draw and save inside `with style():`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from megaconsa.consa.allocation import Allocation
from megaconsa.reporting.metrics import Row, series

INK, PAPER = "#010203", "#fefdfc"
"""Stand for the page's text and background colours while matplotlib draws."""
FULL, WINDOW, THIRD, FOURTH = "#3b7ddd", "#e2a33b", "#2ba889", "#d1607e"
"""Full attention, sliding window, and two more: told apart by colour-blind readers, legible on white and on near-black."""
RUN_COLOURS = (FULL, WINDOW, THIRD, FOURTH, "#8a6fd1", "#7a8aa0")
GATES = LinearSegmentedColormap.from_list("gates", [WINDOW, "#a9adb5", FULL])
"""0 is the window, 1 full attention, grey undecided."""
TABLE = ListedColormap([WINDOW, FULL])
HALF, NARROW = 6.0, 4.0
"""Widths in inches of figures that stand two and three in a row."""
POINTS = 400
"""Most points of a curve; more rows than that are drawn as mean and range of as many groups."""

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
    """What every figure here is drawn and saved in."""
    return matplotlib.rc_context(STYLE)  # type: ignore[arg-type]  # the stubs want literal keys


def allocation_maps(
    probability: Sequence[Sequence[float]] | None,
    step: int | None,
    full: Sequence[Sequence[bool]] | None,
    origin: str,
    window: int | None,
) -> Figure:
    """Layers x KV heads, layer 0 at the bottom: learned P(z > 0), where given, beside the table, where given.

    probability: (layers, kv_heads), or (layers, 1) where a layer is one unit, and the step it stands for; full: (layers, kv_heads),
    and what to call it.
    """
    tables: list[tuple[str, NDArray[np.float64]]] = []
    if probability is not None:
        tables.append(
            (
                f"P(z > 0){'' if step is None else f' at step {step:,}'}",
                np.array(probability, dtype=np.float64),
            )
        )
    if full is not None:
        tables.append((origin, np.array(full, dtype=np.float64)))
    layers = len(tables[0][1])
    figure, axes = _figure(HALF, _map_height(layers), len(tables))
    colours = TABLE if probability is None else GATES
    for axis, (title, table) in zip(axes, tables, strict=True):
        mesh = axis.pcolormesh(table, cmap=colours, vmin=0, vmax=1, edgecolors="none")
        _gaps(axis, *table.shape)
        axis.set(
            title=title, xlabel="KV head" if table.shape[1] > 1 else "all KV heads", ylabel="layer"
        )
        _name_cells(axis.set_xticks, table.shape[1])
        _name_cells(axis.set_yticks, layers)
        axis.grid(False)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    narrow = "window" if window is None else f"window {window:,}"
    _bar(figure, mesh, axes, [narrow, "" if probability is None else "undecided", "full"])
    return figure


def layer_history(rows: Sequence[Row]) -> Figure | None:
    """Expected sparsity of each layer over the steps: where the windows went, and when."""
    held = [row for row in rows if isinstance(row.get("layer_expected_sparsity"), list)]
    if len(held) < 2:
        return None
    held = [
        held[i] for i in np.unique(np.linspace(0, len(held) - 1, min(len(held), 160)).astype(int))
    ]
    table = 1 - np.array([row["layer_expected_sparsity"] for row in held], dtype=np.float64).T
    figure, (axis,) = _figure(HALF, _map_height(len(table)))
    span = (held[0]["step"], held[-1]["step"], 0, len(table))
    image = axis.imshow(
        table,
        cmap=GATES,
        vmin=0,
        vmax=1,
        aspect="auto",
        origin="lower",
        extent=span,
        interpolation="none",
    )
    axis.set(title="Share of full attention expected in each layer", xlabel="step", ylabel="layer")
    _name_cells(axis.set_yticks, len(table))
    axis.grid(False)
    axis.spines[:].set_visible(False)
    _bar(figure, image, [axis], ["all windows", "half", "all full"])
    return figure


def sparsity(rows: Sequence[Row]) -> Figure:
    figure, (axis,) = _figure(HALF, 3.1)
    _curve(axis, rows, "sampled_sparsity", "sampled", THIRD, width=0.8, alpha=0.65)
    if any("threshold_sparsity" in row for row in rows):
        _curve(axis, rows, "threshold_sparsity", "threshold", FOURTH, style=":")
    _curve(axis, rows, "binarized_sparsity", "binarised, top-k", WINDOW)
    _curve(axis, rows, "expected_sparsity", "expected", FULL, width=2)
    _curve(axis, rows, "target_sparsity", "target", INK, style="--", width=1)
    axis.set(title="Sparsity", xlabel="step", ylim=(-0.02, 1.02))
    return _finish(figure, axis)


def multipliers(rows: Sequence[Row]) -> Figure | None:
    """lambda and phi; with a constraint for each layer their mean and range."""
    held = [row for row in rows if isinstance(row.get("multipliers"), dict)]
    if not held:
        return None
    figure, axes = _figure(HALF, 3.1, 2)
    steps = np.array([row["step"] for row in held], dtype=np.float64)
    for axis, name, symbol, colour in zip(
        axes, ("lambda", "phi"), ("λ", "φ"), (FULL, WINDOW), strict=True
    ):
        values = np.array(
            [np.atleast_1d(row["multipliers"].get(name, np.nan)) for row in held], dtype=np.float64
        )
        _band(axis, steps, values, colour)
        constraints = values.shape[1]
        axis.set(
            title=f"Multiplier {symbol}"
            + (f", {constraints} constraints" if constraints > 1 else ""),
            xlabel="step",
        )
    return figure


def decided(rows: Sequence[Row]) -> Figure:
    figure, axes = _figure(HALF, 3.1, 2)
    _curve(axes[0], rows, "decided_share", "", FULL, width=2)
    axes[0].set(title="Decided share of units (no evidence)", xlabel="step", ylim=(-0.02, 1.02))
    _curve(axes[1], rows, "cut_margin", "", WINDOW, width=2)
    axes[1].set(title="Gap between scores at the cut", xlabel="step")
    return figure


def evidence(rows: Sequence[Row]) -> Figure:
    """Whether the order of the units would be found again, and how many of them it tells apart."""
    figure, (axis,) = _figure(HALF, 3.1)
    _curve(axis, rows, "split_agreement", "split agreement", FULL, width=2)
    _curve(axis, rows, "time_agreement", "time agreement", THIRD)
    _curve(axis, rows, "separated_share", "separated share", WINDOW, width=2)
    axis.axhline(0, color=INK, linewidth=0.6)
    axis.set(title="Evidence: 0 is noise, 1 is certain", xlabel="step", ylim=(-0.3, 1.02))
    return _finish(figure, axis)


def unit_evidence(
    scores: Sequence[Sequence[float]],
    errors: Sequence[Sequence[float | None]],
    full: Sequence[Sequence[bool]] | None,
) -> Figure:
    """Every unit's score with two standard errors, in order: units whose bars overlap cannot be told apart.

    scores, errors: (layers, units). full: (layers, KV heads), coloured if given.
    """
    values = np.array(scores, dtype=np.float64)
    bars = 2 * np.array(errors, dtype=np.float64)
    kept = (
        np.array(full)[:, : values.shape[1]]
        if full is not None
        else np.ones(values.shape, dtype=bool)
    )
    order = np.argsort(-values.ravel())
    places = np.arange(values.size)
    figure, (axis,) = _figure(HALF, 3.1)
    for colour, label, chosen in (
        (FULL, "full", kept.ravel()[order]),
        (WINDOW, "window", ~kept.ravel()[order]),
    ):
        axis.errorbar(
            places[chosen],
            values.ravel()[order][chosen],
            bars.ravel()[order][chosen],
            color=colour,
            label=label,
            fmt=".",
            markersize=4,
            elinewidth=0.8,
        )
    scale = float(np.median(np.abs(values))) or 1.0
    axis.set_yscale("symlog", linthresh=scale)
    axis.set(
        title="Loss that opening a unit saves, nats a token (2 standard errors)",
        xlabel="units in order",
    )
    return _finish(figure, axis)


def loss(rows: Sequence[Row], unigram_entropy: float | None) -> Figure:
    figure, (axis,) = _figure(HALF, 3.1)
    _curve(axis, rows, "loss", "training", FULL)
    steps, values = series(rows, "validation_loss")
    axis.plot(
        steps,
        values,
        color=WINDOW,
        marker="o",
        markersize=3.5,
        label="validation" if len(steps) else None,
    )
    _entropy(axis, unigram_entropy)
    axis.set(title="Loss, nats a token", xlabel="step")
    return _finish(figure, axis)


def losses_together(
    runs: Sequence[tuple[str, Sequence[Row]]], unigram_entropy: float | None
) -> Figure:
    """Several runs over the tokens each has seen, in one axis."""
    figure, (axis,) = _figure(11.2, 3.8)
    for number, (name, rows) in enumerate(runs):
        colour = RUN_COLOURS[number % len(RUN_COLOURS)]
        _curve(axis, rows, "loss", name, colour, x="tokens")
        tokens, values = series(rows, "validation_loss", "tokens")
        axis.plot(
            tokens,
            values,
            color=colour,
            marker="o",
            markersize=4,
            linestyle="none",
            markeredgecolor=INK,
            markeredgewidth=0.5,
        )
    _entropy(axis, unigram_entropy)
    axis.set(title="Loss of all runs, nats a token; points are validation", xlabel="tokens")
    axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
    return _finish(figure, axis)


def learning_rate(rows: Sequence[Row]) -> Figure:
    figure, (axis,) = _figure(NARROW, 2.5)
    _curve(axis, rows, "learning_rate", "", FULL)
    axis.set(title="Learning rate", xlabel="step")
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    return figure


def gradient_norm(rows: Sequence[Row]) -> Figure:
    figure, (axis,) = _figure(NARROW, 2.5)
    _curve(axis, rows, "grad_norm", "weights", FULL)
    _curve(axis, rows, "gate_grad_norm", "gates", WINDOW)
    axis.set(title="Gradient norm before clipping", xlabel="step", yscale="log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    return _finish(figure, axis)


def throughput(rows: Sequence[Row]) -> Figure:
    figure, (axis,) = _figure(NARROW, 2.5)
    _curve(axis, rows, "tokens_per_second", "", THIRD)
    axis.set(title="Tokens per second", xlabel="step")
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(EngFormatter(sep=" "))
    return figure


def save_allocation(allocation: Allocation, path: Path) -> None:
    """The table's map as a picture of its own."""
    with style():
        title = f"sparsity {allocation.sparsity:.3g}"
        figure = allocation_maps(None, None, allocation.full, title, allocation.window)
        figure.savefig(path, dpi=150, metadata={"Software": None})


def to_svg(figure: Figure) -> str:
    """The figure as an inline <svg> element: ink as currentColor, no metadata, no namespaces, no ids but those it refers to."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)
    text = re.sub(r"font: ([^;\"]*?)'[^;\"]*sans-serif", r"font: \1sans-serif", text)
    return text.replace(INK, "currentColor").replace(PAPER, "var(--paper)")


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure in inches and its axes, without pyplot's global state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0].tolist()
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(6 if columns == 1 else 4, integer=True))
    return figure, axes


def _finish(figure: Figure, axis: Axes) -> Figure:
    """A legend where there is more than one curve."""
    handles, _ = axis.get_legend_handles_labels()
    if len(handles) > 1:
        axis.legend(ncols=min(len(handles), 3), handlelength=1.6, columnspacing=1.2)
    return figure


def _curve(
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
    """Draws a field where the rows hold it, long ones as the mean of groups in a band of their range."""
    steps, values = series(rows, name, x)
    if not len(steps):
        return
    if len(steps) > POINTS:
        groups = np.array_split(np.arange(len(steps)), POINTS)
        low, high = (
            np.array([reduce(values[group]) for group in groups]) for reduce in (np.min, np.max)
        )
        steps, values = (
            np.array([array[group].mean() for group in groups]) for array in (steps, values)
        )
        axis.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
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


def _band(axis: Axes, steps: NDArray[np.float64], values: NDArray[np.float64], colour: str) -> None:
    """Mean and range over the columns of values (steps, constraints)."""
    if len(steps) > POINTS:
        chosen = np.linspace(0, len(steps) - 1, POINTS).astype(int)
        steps, values = steps[chosen], values[chosen]
    if values.shape[1] > 1:
        axis.fill_between(
            steps, values.min(axis=1), values.max(axis=1), color=colour, alpha=0.25, linewidth=0
        )
    axis.plot(steps, values.mean(axis=1), color=colour, linewidth=2)


def _entropy(axis: Axes, unigram_entropy: float | None) -> None:
    if unigram_entropy is not None:
        axis.axhline(
            unigram_entropy,
            color=INK,
            linewidth=1,
            linestyle="--",
            alpha=0.7,
            label="unigram entropy",
        )


def _map_height(layers: int) -> float:
    return max(3.4, 1.4 + 0.11 * layers)


def _gaps(axis: Axes, layers: int, heads: int) -> None:
    """Lines of the background's colour between the cells."""
    axis.hlines(np.arange(layers + 1), 0, heads, color=PAPER, linewidth=1.2)
    axis.vlines(np.arange(heads + 1), 0, layers, color=PAPER, linewidth=1.2)


def _name_cells(set_ticks: Any, count: int) -> None:
    """Numbers at the middles of the cells, about a dozen at most."""
    stride = max(1, -(-count // 14))
    set_ticks(np.arange(0, count, stride) + 0.5, [str(cell) for cell in range(0, count, stride)])


def _bar(figure: Figure, image: ScalarMappable, axes: Sequence[Axes], names: Sequence[str]) -> None:
    """The colours of 0, 1/2 and 1 by name, below the axes."""
    bar = figure.colorbar(
        image, ax=list(axes), location="bottom", aspect=45, fraction=0.05, pad=0.03, shrink=0.7
    )
    bar.set_ticks([0.0, 0.5, 1.0], labels=list(names))
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
