"""Colours, kinds of line and scales of the figures."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megaconsa.consa.allocation import Allocation
from megaconsa.reporting import gate_plots, training_plots
from megaconsa.reporting.plot_style import (
    RUN_COLOURS,
    legend,
    log_ticks,
    run_line,
    style,
)
from megaconsa.reporting.terminal import text_map

DEUTERANOPIA = np.array(
    [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]
)
"""What the most common colour blindness makes of linear red, green and blue (Machado 2009)."""
TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def linear(colour: str) -> NDArray[np.float64]:
    """Linear red, green and blue of #rrggbb."""
    values = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    dark = values <= 0.04045
    result: NDArray[np.float64] = np.where(dark, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return result


def oklab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """The colour in a space in which distances are those that people see."""
    return TO_LAB @ np.cbrt(TO_CONES @ rgb)


def test_ten_colours_can_be_told_apart_and_seen_on_light_and_dark() -> None:
    assert len(RUN_COLOURS) == 10
    for one, other in combinations(map(linear, RUN_COLOURS), 2):
        assert np.linalg.norm(oklab(one) - oklab(other)) > 0.08
        seen = [oklab(np.clip(DEUTERANOPIA @ colour, 0, 1)) for colour in (one, other)]
        assert np.linalg.norm(seen[0] - seen[1]) > 0.05
    for colour in map(linear, RUN_COLOURS):
        light = colour @ [0.2126, 0.7152, 0.0722]
        assert 1.05 / (light + 0.05) > 2
        assert (light + 0.05) / (linear("#1b1e24") @ [0.2126, 0.7152, 0.0722] + 0.05) > 2


def test_forty_runs_have_lines_of_their_own() -> None:
    assert len({run_line(number) for number in range(40)}) == 40


@pytest.mark.parametrize(
    "limits", [(0.9, 1.3), (1.01, 1.02), (0.3, 4), (1e-6, 1e5), (2.1, 2.9), (0.8, 12)]
)
def test_a_logarithmic_axis_has_ticks_on_any_range(limits: tuple[float, float]) -> None:
    ticks = log_ticks(*limits)
    assert 2 <= len(ticks) <= 8
    assert all(limits[0] <= tick <= limits[1] for tick in ticks)


def test_narrow_gradient_norms_have_ticks() -> None:
    rows = [{"step": step, "grad_norm": 1.1 + 0.05 * (step % 3)} for step in range(1, 30)]
    with style():
        drawing = training_plots.gradient_norm(rows, 1)
        (axis,) = drawing.figure.axes
        low, high = axis.get_ylim()
        assert len([tick for tick in axis.get_yticks() if low <= tick <= high]) >= 2


def test_layer_0_is_on_top_everywhere() -> None:
    full = ((True, True), (True, False), (False, False))
    with style():
        drawing = gate_plots.allocation_maps(None, None, full, "table", 8)
        low, high = drawing.figure.axes[0].get_ylim()
    assert low > high
    lines = text_map(Allocation(8, full)).splitlines()
    assert [line.split()[1] for line in lines] == ["0", "1", "2"]


def test_legends_name_every_curve_and_stand_outside_the_figure() -> None:
    rows = [{"step": step, "grad_norm": 1.0, "gate_grad_norm": 0.1} for step in (1, 2, 3)]
    with style():
        figure: Figure = training_plots.gradient_norm(rows, 1).figure
    assert [label for label, _, _ in legend(figure)] == ["weights", "gates"]
    assert all(axis.get_legend() is None for axis in figure.axes)


def test_multipliers_without_phi_have_no_empty_axes() -> None:
    rows = [{"step": step, "multipliers": {"lambda": [0.1]}} for step in (1, 2)]
    with style():
        drawing = gate_plots.multipliers(rows)
    assert drawing is not None
    assert len(drawing.figure.axes) == 1
