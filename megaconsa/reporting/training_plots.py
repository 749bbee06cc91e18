"""Figures about training: loss, learning rate, gradient norm and throughput.

Draw and save them inside `with style():` of megaconsa.reporting.plot_style.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from megaconsa.reporting.metrics import Row, series
from megaconsa.reporting.plot_style import (
    FULL,
    HALF,
    INK,
    NARROW,
    RUN_COLOURS,
    THIRD,
    WINDOW,
    draw_curve,
    new_figure,
    with_legend,
)

SOURCE_LOSS = "validation_loss_"
"""Beginning of the field with the loss on one source of a mixture."""


def loss(rows: Sequence[Row], unigram_entropy: float | None) -> Figure:
    """Draws training and validation loss, with the unigram entropy in nats if it is known."""
    figure, (axis,) = new_figure(HALF, 3.1)
    draw_curve(axis, rows, "loss", "training", FULL)
    steps, values = series(rows, "validation_loss")
    axis.plot(
        steps,
        values,
        color=WINDOW,
        marker="o",
        markersize=3.5,
        label="validation" if len(steps) else None,
    )
    for number, name in enumerate(_sources(rows)):
        steps, values = series(rows, SOURCE_LOSS + name)
        colour = RUN_COLOURS[number % len(RUN_COLOURS)]
        axis.plot(steps, values, color=colour, linewidth=0.9, label=f"validation on {name}")
    _draw_entropy(axis, unigram_entropy)
    axis.set(title="Loss, nats a token", xlabel="step")
    return with_legend(figure, axis)


def _sources(rows: Sequence[Row]) -> list[str]:
    """The sources of a mixture that the run was validated on."""
    found: dict[str, None] = {}
    for row in rows:
        for field in row:
            if field.startswith(SOURCE_LOSS):
                found[field.removeprefix(SOURCE_LOSS)] = None
    return list(found)


def losses_together(
    runs: Sequence[tuple[str, Sequence[Row]]], unigram_entropy: float | None
) -> Figure:
    """Draws several runs on one axis, each over the tokens that it has seen.

    runs: names and rows.
    """
    figure, (axis,) = new_figure(11.2, 3.8)
    for number, (name, rows) in enumerate(runs):
        colour = RUN_COLOURS[number % len(RUN_COLOURS)]
        draw_curve(axis, rows, "loss", name, colour, x="tokens")
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
    _draw_entropy(axis, unigram_entropy)
    axis.set(title="Loss of all runs, nats a token; points are validation", xlabel="tokens")
    axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
    return with_legend(figure, axis)


def learning_rate(rows: Sequence[Row]) -> Figure:
    """Draws the learning rate."""
    figure, (axis,) = new_figure(NARROW, 2.5)
    draw_curve(axis, rows, "learning_rate", "", FULL)
    axis.set(title="Learning rate", xlabel="step")
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    return figure


def gradient_norm(rows: Sequence[Row]) -> Figure:
    """Draws the gradient norms of weights and gates before clipping."""
    figure, (axis,) = new_figure(NARROW, 2.5)
    draw_curve(axis, rows, "grad_norm", "weights", FULL)
    draw_curve(axis, rows, "gate_grad_norm", "gates", WINDOW)
    axis.set(title="Gradient norm before clipping", xlabel="step", yscale="log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    return with_legend(figure, axis)


def throughput(rows: Sequence[Row]) -> Figure:
    """Draws the tokens per second."""
    figure, (axis,) = new_figure(NARROW, 2.5)
    draw_curve(axis, rows, "tokens_per_second", "", THIRD)
    axis.set(title="Tokens per second", xlabel="step")
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(EngFormatter(sep=" "))
    return figure


def _draw_entropy(axis: Axes, unigram_entropy: float | None) -> None:
    if unigram_entropy is None:
        return
    axis.axhline(
        unigram_entropy,
        color=INK,
        linewidth=1,
        linestyle="--",
        alpha=0.7,
        label="unigram entropy",
    )
