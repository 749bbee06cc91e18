"""Figures about the training of one run: loss, learning rate, gradient norm and throughput.

Draw and save them inside `with style():` of megaconsa.reporting.plot_style.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from megaconsa.reporting.metrics import Row, series
from megaconsa.reporting.plot_style import (
    COLUMN,
    FULL,
    HEIGHT,
    INK,
    THIRD,
    WINDOW,
    Drawing,
    draw_curve,
    log_scale,
    new_figure,
    run_line,
)

SOURCE_LOSS = "validation_loss_"
"""Beginning of the field with the loss on one source of a mixture."""
FIRST_SOURCE_LINE = 2
"""Number of the first source's line. Training and validation have the colours before it."""


def loss(rows: Sequence[Row], unigram_entropy: float | None, smooth: int) -> Drawing:
    """Draws training and validation loss, with the unigram entropy in nats if it is known.

    smooth: number of steps of the moving average.
    """
    figure, (axis,) = new_figure(COLUMN, HEIGHT)
    draw_curve(axis, series(rows, "loss"), "training", FULL, smooth=smooth)
    steps, values = series(rows, "validation_loss")
    if len(steps):
        axis.plot(steps, values, color=WINDOW, marker="o", markersize=3.5, label="validation")
    for number, name in enumerate(_sources(rows)):
        steps, values = series(rows, SOURCE_LOSS + name)
        colour, dash = run_line(FIRST_SOURCE_LINE + number)
        label = f"validation on {name}"
        axis.plot(steps, values, color=colour, linestyle=dash, linewidth=0.9, label=label)
    draw_entropy(axis, unigram_entropy)
    axis.set(xlabel="step", ylabel="nats per token")
    caption = "Good: both fall, and validation stays close to training. " + smoothing(smooth)
    if unigram_entropy is not None:
        caption += (
            " A model below the dashed line knows more than how often each token occurs "
            "(unigram entropy)."
        )
    if any("expected_sparsity" in row for row in rows):
        caption += " While learning, validation uses the binarised table."
    return Drawing("Loss", caption, figure)


def _sources(rows: Sequence[Row]) -> list[str]:
    """The sources of a mixture that the run was validated on."""
    found: dict[str, None] = {}
    for row in rows:
        for field in row:
            if field.startswith(SOURCE_LOSS):
                found[field.removeprefix(SOURCE_LOSS)] = None
    return list(found)


def learning_rate(rows: Sequence[Row]) -> Drawing:
    """Draws the learning rate."""
    figure, (axis,) = new_figure(COLUMN, HEIGHT)
    draw_curve(axis, series(rows, "learning_rate"), "learning rate", FULL)
    axis.set(xlabel="step", ylim=(0, None))
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    caption = "Of the weights. A second stage should begin where the first one ended."
    return Drawing("Learning rate", caption, figure)


def gradient_norm(rows: Sequence[Row], smooth: int) -> Drawing:
    """Draws the gradient norms of weights and gates before clipping."""
    figure, (axis,) = new_figure(COLUMN, HEIGHT)
    draw_curve(axis, series(rows, "grad_norm"), "weights", FULL, smooth=smooth)
    draw_curve(axis, series(rows, "gate_grad_norm"), "gates", WINDOW, smooth=smooth)
    axis.set(xlabel="step")
    if axis.lines:
        log_scale(axis)
    caption = (
        "Good: falls early and then stays level. Rising or spiking norms announce divergence; "
        "a lower learning rate helps."
    )
    return Drawing("Gradient norm before clipping", caption, figure)


def throughput(rows: Sequence[Row], smooth: int) -> Drawing:
    """Draws the tokens per second."""
    figure, (axis,) = new_figure(COLUMN, HEIGHT)
    draw_curve(axis, series(rows, "tokens_per_second"), "tokens/s", THIRD, smooth=smooth)
    axis.set(xlabel="step", ylim=(0, None))
    axis.yaxis.set_major_formatter(EngFormatter(sep=" "))
    caption = (
        "Of all ranks together. Good: level. The first steps compile and are slow. Dips in step "
        "with checkpoints or data waits cost time; megaconsa status names slow ranks."
    )
    return Drawing("Tokens per second", caption, figure)


def draw_entropy(axis: Axes, unigram_entropy: float | None) -> None:
    """Draws the unigram entropy as a dashed line, if it is known."""
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


def smoothing(steps: int, shows_noise: bool = True) -> str:
    """Returns the sentence about the moving average."""
    if steps < 2:
        return ""
    text = f"The line is the mean of {steps:,} steps"
    return f"{text}, with the steps themselves faint behind it." if shows_noise else f"{text}."
