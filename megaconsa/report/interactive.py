"""Turns a drawing into what the page shows: SVG, its legend, and what the page's script needs.

The script (page.js) reads the points of a curve from its path. It also needs to know where each
axes lies in the SVG and which values its edges have. Without the script, the page shows the same
figures.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from megaconsa.reporting.plot_style import INK, TABLE, Drawing, legend, to_svg

POINTS_PER_INCH = 72
"""matplotlib's SVG has one unit per point."""


@dataclass(frozen=True)
class Chart:
    """One SVG of a figure."""

    svg: Markup
    data: str
    """JSON for the script."""
    narrow: bool | None
    """Whether it is for narrow pages only, or for wide ones only. None is for both."""


@dataclass(frozen=True)
class PageFigure:
    """A figure of the page."""

    title: str
    caption: str
    legend: list[tuple[str, str, str]]
    """Label, colour and kind of line of each curve."""
    charts: list[Chart]

    @property
    def is_wide(self) -> bool:
        return len(self.charts) > 1


def page_figure(drawing: Drawing) -> PageFigure:
    """Draws the figure. Call it inside `with style():`."""
    entries = legend(drawing.figure)
    if drawing.narrow is None:
        charts = [_chart(drawing.figure, None)]
    else:
        charts = [_chart(drawing.figure, False), _chart(drawing.narrow, True)]
    return PageFigure(drawing.title, drawing.caption, entries, charts)


def _chart(figure: Figure, narrow: bool | None) -> Chart:
    described = [_mark(axis, number) for number, axis in enumerate(figure.axes)]
    svg = to_svg(figure)
    # The layout is settled only once the figure has been drawn.
    for axis, entry in zip(figure.axes, described, strict=True):
        if entry is not None:
            entry["box"] = _box(figure, axis)
    return Chart(Markup(svg), json.dumps(described, separators=(",", ":")), narrow)


def _mark(axis: Axes, number: int) -> dict[str, Any] | None:
    """Names the curves in the SVG. Returns what the script needs, or None for a colour bar."""
    if axis.get_label() == "<colorbar>":
        return None
    labels = _labels(axis)
    curves = {}
    for place, line in enumerate(axis.lines):
        name = f"{number}.{place}"
        line.set_gid(f"curve_{name}")
        follows_data = line.get_transform() == axis.transData
        colour = matplotlib.colors.to_hex(line.get_color())
        own = str(line.get_label())
        curves[name] = {
            "label": labels.get((colour, str(line.get_linestyle())), labels.get((colour, ""), "")),
            "colour": colour.replace(INK, "currentColor"),
            "hover": follows_data and not own.startswith("_"),
        }
    for place, band in enumerate(axis.collections):
        if not isinstance(band, QuadMesh) and len(band.get_facecolor()):
            name = f"{number}.{len(axis.lines) + place}"
            band.set_gid(f"curve_{name}")
            colour = matplotlib.colors.to_hex(tuple(np.asarray(band.get_facecolor())[0]))
            curves[name] = {
                "label": labels.get((colour, ""), ""),
                "colour": colour,
                "hover": False,
                "band": True,
            }
    entry: dict[str, Any] = {
        "x": [*axis.get_xlim(), axis.get_xscale()],
        "y": [*axis.get_ylim(), axis.get_yscale()],
        "xname": axis.get_xlabel() or "",
        "yname": axis.get_ylabel() or "",
        "curves": curves,
    }
    cells = _cells(axis)
    if cells is not None:
        entry["cells"] = cells
    return entry


def _labels(axis: Axes) -> dict[tuple[str, str], str]:
    """Returns the label of each colour and kind of line, and of each colour alone."""
    found: dict[tuple[str, str], str] = {}
    for line in axis.lines:
        label = str(line.get_label())
        if not label.startswith("_"):
            colour = matplotlib.colors.to_hex(line.get_color())
            found.setdefault((colour, str(line.get_linestyle())), label)
            found.setdefault((colour, ""), label)
    return found


def _cells(axis: Axes) -> dict[str, Any] | None:
    """Returns the values of a map and the edges of its first and last cells."""
    for mesh in axis.collections:
        if isinstance(mesh, QuadMesh):
            values = np.asarray(mesh.get_array())
            rows, columns = values.shape
            return _map(mesh, values, [0, columns], [0, rows])
    for image in axis.images:
        left, right, bottom, top = image.get_extent()
        return _map(image, np.asarray(image.get_array()), [left, right], [top, bottom])
    return None


def _map(mappable: Any, values: Any, x: list[float], y: list[float]) -> dict[str, Any]:
    names = ["window", "full"] if mappable.get_cmap() == TABLE else None
    return {"x": x, "y": y, "values": np.round(values, 3).tolist(), "names": names}


def _box(figure: Figure, axis: Axes) -> list[float]:
    """Returns the left, top, right and bottom edge of the axes in the SVG."""
    width, height = figure.get_size_inches() * POINTS_PER_INCH
    place = axis.get_position()
    edges = [place.x0 * width, (1 - place.y1) * height, place.x1 * width, (1 - place.y0) * height]
    return [round(float(edge), 3) for edge in edges]
