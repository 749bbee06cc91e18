"""One self-contained HTML page about a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from megaconsa.files import replace_text
from megaconsa.reporting import plot_style
from megaconsa.study import table
from megaconsa.study.fields import Study
from megaconsa.study.pictures import allocation_maps, dot_plot
from megaconsa.study.results import ResultRow


def write_page(study: Study, name: str, rows: Sequence[ResultRow], out: Path, missing: int) -> None:
    """Writes the page.

    name: title of the page.
    missing: number of trials that are not measured yet.
    """
    environment = Environment(
        loader=PackageLoader("megaconsa.study", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    with plot_style.style():
        sections = [_section(rows, sparsity) for sparsity in _sparsities(rows)]
    settings = study.model_dump(mode="json", exclude_defaults=True)
    text = environment.get_template("page.html").render(
        title=name,
        missing=missing,
        headings=table.HEADINGS,
        rows=[table.cells(row) for row in rows],
        note=table.NOTE,
        sections=sections,
        settings=yaml.safe_dump(settings, sort_keys=False),
    )
    replace_text(out, text)


def _sparsities(rows: Sequence[ResultRow]) -> list[float]:
    return sorted({row.target for row in rows if row.target is not None})


def _section(rows: Sequence[ResultRow], sparsity: float) -> tuple[str, list[Markup]]:
    """Returns the title and the figures of one sparsity.

    Arms that do not depend on the sparsity are drawn beside the others.
    """
    beside = [row for row in rows if row.target in (sparsity, None)]
    own = [row for row in rows if row.target == sparsity]
    title = f"Sparsity {sparsity:g}"
    figures: list[Figure | None] = [dot_plot(beside, title), allocation_maps(own)]
    drawn = [Markup(plot_style.to_svg(figure)) for figure in figures if figure is not None]
    return title, drawn
