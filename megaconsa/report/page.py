"""Writes the page: the comparison of the runs, evaluations, and a section for each run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from megaconsa.console import check_out
from megaconsa.evaluation.record import Evaluation
from megaconsa.files import parse_json, replace_text
from megaconsa.report import comparison
from megaconsa.report.comparison import Table
from megaconsa.report.comparison_plots import losses_less_baseline, losses_together
from megaconsa.report.evaluations import evaluation_drawings, evaluation_table
from megaconsa.report.facts import Fact, facts, provenance
from megaconsa.report.figures import run_drawings, smooth_steps
from megaconsa.report.interactive import PageFigure, page_figure
from megaconsa.report.runs import Found, Run, find_runs
from megaconsa.reporting.plot_style import style
from megaconsa.reporting.samples import Samples

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Section:
    """The part of the page about one run."""

    title: str
    kind: str
    facts: list[Fact]
    figures: list[PageFigure]
    settings: list[tuple[str, str]]
    """Dotted names and values of the configuration."""
    starts: list[list[tuple[str, str]]]
    """What produced the run, the newest start first."""
    samples: Samples


@dataclass(frozen=True)
class EvaluationSection:
    """The part of the page about one evaluation."""

    title: str
    table: Table
    figures: list[PageFigure]


@dataclass(frozen=True)
class Comparison:
    """The part of the page about all runs."""

    summary: Table
    settings: Table
    figures: list[PageFigure]


def write_report(
    folder: Path,
    out: Path | None = None,
    baseline: str | None = None,
    smooth: int | None = None,
    found: Found | None = None,
) -> Path:
    """Writes the page about a run, or about all runs in and below a folder. Returns its path.

    Folders that look like runs but cannot be reported are named in the log and on the page.

    out: the file to write. None is `folder`/report.html.
    baseline: name of the run from which the losses of the others are subtracted. None chooses one.
    smooth: steps of the moving average of noisy curves. None is a share of each run's steps.
    found: what `find_runs` found in the folder, if it was called before.

    Raises InputError if there is nothing to report or the file cannot be written.
    """
    found = find_runs(folder) if found is None else found
    out = folder / "report.html" if out is None else out
    check_out(out)
    replace_text(out, render(folder.resolve().name, found, baseline, smooth))
    for left_out in found.left_out:
        logger.warning("%s is left out: %s", left_out.folder, left_out.reason)
    return out


def render(title: str, found: Found, baseline: str | None = None, smooth: int | None = None) -> str:
    """Returns the page as text. Raises InputError if no run is called `baseline`."""
    runs = found.runs
    chosen = comparison.choose_baseline(runs, baseline)
    entropies = [entropy for run in runs if (entropy := _unigram_entropy(run)) is not None]
    entropy = entropies[0] if entropies else None
    with style():
        compared = None
        if len(runs) > 1:
            compared = _comparison(runs, chosen, entropy, smooth)
        evaluations = [_evaluation(*named) for named in found.evaluations]
        sections = [_section(run, entropy, smooth) for run in runs]
    environment = Environment(
        loader=PackageLoader("megaconsa.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        title=title,
        comparison=compared,
        evaluations=evaluations,
        sections=sections,
        left_out=found.left_out,
        css=_file("page.css"),
        script=_file("page.js"),
    )


def _comparison(
    runs: Sequence[Run], baseline: Run | None, entropy: float | None, smooth: int | None
) -> Comparison:
    steps = partial(smooth_steps, chosen=smooth)
    drawings = [losses_together(runs, entropy, steps)]
    if baseline is not None:
        less = losses_less_baseline(runs, baseline, steps)
        if less is not None:
            drawings.append(less)
    figures = [page_figure(drawing) for drawing in drawings]
    return Comparison(
        comparison.summary(runs, baseline), comparison.differing_settings(runs), figures
    )


def _evaluation(name: str, evaluation: Evaluation) -> EvaluationSection:
    figures = [page_figure(drawing) for drawing in evaluation_drawings(evaluation)]
    return EvaluationSection(name, evaluation_table(evaluation), figures)


def _section(run: Run, entropy: float | None, smooth: int | None) -> Section:
    drawings = run_drawings(run, entropy, smooth_steps(run, smooth))
    return Section(
        run.name,
        run.kind,
        facts(run),
        [page_figure(drawing) for drawing in drawings],
        comparison.settings(run),
        [provenance(start) for start in reversed(run.starts)],
        run.samples,
    )


def _unigram_entropy(run: Run) -> float | None:
    """Returns nats per token, from the data's dataset.json if it can still be found."""
    places = [run.folder.parent / "data"]
    if run.config:
        places.insert(0, run.config.data.path)
    for place in places:
        try:
            return float(parse_json((place / "dataset.json").read_text())["unigram_entropy"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def _file(name: str) -> Markup:
    """Returns a file of this package, to be put into the page as it is."""
    return Markup(resources.files("megaconsa.report").joinpath(name).read_text())
