"""The picture of an evaluation."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from megaconsa.evaluation import picture
from megaconsa.reporting.plot_style import style
from tests.support.made_evaluation import made_evaluation


def test_points_of_models_lie_side_by_side_with_markers_of_their_own() -> None:
    evaluation = made_evaluation()
    with style():
        axis = Figure().subplots()
        picture.draw_perplexity(axis, evaluation)
    handles, labels = axis.get_legend_handles_labels()
    assert labels == ["dense", "learned", "random"]
    places = np.array([handle.get_xdata() for handle in handles])
    assert np.all(np.diff(places, axis=0) > 0.1)
    assert np.all(places[:, 0] > 0)
    assert np.all(places[:, 0] < 1)
    assert len({handle.get_marker() for handle in handles}) == 3


def test_needles_have_a_diverging_scale_around_zero() -> None:
    evaluation = made_evaluation()
    largest = picture.largest_gain(evaluation)
    cells = evaluation.models["random"].needle
    assert cells is not None
    assert min(cell.margin for cell in cells) < 0
    assert largest == max(abs(cell.margin) for cell in cells)
    with style():
        figure = Figure()
        axis = figure.subplots()
        mesh = picture.draw_needle_map(axis, cells, largest)
        picture.draw_gain_bar(figure, mesh, [axis], largest)
    assert mesh.get_clim() == (-largest, largest)
    red, green, blue, _ = mesh.get_cmap()(0.5)
    assert min(red, green, blue) > 0.95
    assert 0 in figure.axes[1].get_yticks()
