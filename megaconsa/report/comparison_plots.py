"""Figures over several runs: their losses, and the losses minus those of a baseline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from megaconsa.report.comparison import Floats, loss_difference, placed
from megaconsa.report.runs import Run
from megaconsa.reporting.plot_style import (
    COLUMN,
    HEIGHT,
    INK,
    WIDE,
    Drawing,
    draw_curve,
    new_figure,
    run_line,
)
from megaconsa.reporting.training_plots import draw_entropy, smoothing

WIDE_HEIGHT = 4.2
NOISY_RUNS = 4
"""Of more runs than this, only the moving averages are drawn. Their noise would cover them."""


def losses_together(
    runs: Sequence[Run], unigram_entropy: float | None, smooth: Callable[[Run], int]
) -> Drawing:
    """Draws the losses of several runs over the tokens that their weights have seen.

    smooth: the number of steps of a run's moving average.
    """

    noisy = len(runs) <= NOISY_RUNS

    def draw(axis: Axes) -> None:
        for number, run in enumerate(runs):
            steps = smooth(run)
            training = placed(run, "loss")
            _draw(axis, training, placed(run, "validation_loss"), run, number, steps, noisy)
        draw_entropy(axis, unigram_entropy)
        axis.set_ylabel("nats per token")

    caption = "Lines are training, points are validation. Lower is better. "
    if any(run.continues for run in runs):
        caption += "A run that continues another one begins at the tokens where that one ended. "
    caption += smoothing(max(map(smooth, runs)), noisy)
    return _both_widths("Loss of all runs", caption, draw)


def losses_less_baseline(
    runs: Sequence[Run], baseline: Run, smooth: Callable[[Run], int]
) -> Drawing | None:
    """Draws the losses minus those of the baseline, or nothing if no run can be compared."""
    compared = []
    for number, run in enumerate(runs):
        training = loss_difference(run, baseline, "loss")
        validation = loss_difference(run, baseline, "validation_loss")
        if run is not baseline and len(training[0]):
            compared.append((number, run, training, validation))
    if not compared:
        return None

    noisy = len(compared) <= NOISY_RUNS

    def draw(axis: Axes) -> None:
        axis.axhline(0, color=INK, linewidth=1)
        for number, run, training, validation in compared:
            _draw(axis, training, validation, run, number, smooth(run), noisy)
        axis.set_ylabel("nats per token")

    caption = (
        f"Below 0 a run is better than {baseline.name} after the same number of tokens. Runs on "
        "the same batches are subtracted batch by batch, so that most of the noise cancels."
    )
    return _both_widths(f"Loss minus that of {baseline.name}", caption, draw)


def _draw(
    axis: Axes,
    training: tuple[Floats, Floats],
    validation: tuple[Floats, Floats],
    run: Run,
    number: int,
    smooth: int,
    noisy: bool,
) -> None:
    colour, dash = run_line(number)
    draw_curve(axis, training, run.name, colour, dash=dash, smooth=smooth, shows_noise=noisy)
    axis.plot(
        *validation,
        color=colour,
        marker="o",
        markersize=4,
        linestyle="none",
        markeredgecolor=INK,
        markeredgewidth=0.5,
    )


def _both_widths(title: str, caption: str, draw: Callable[[Axes], None]) -> Drawing:
    """Draws the same for a wide page and for a phone."""
    figures: list[Figure] = []
    for width, height in ((WIDE, WIDE_HEIGHT), (COLUMN, HEIGHT)):
        figure, (axis,) = new_figure(width, height)
        draw(axis)
        axis.set_xlabel("tokens")
        axis.xaxis.set_major_formatter(EngFormatter(sep=" "))
        figures.append(figure)
    return Drawing(title, caption, figures[0], figures[1])
