"""The figures of an evaluation, and its table."""

from __future__ import annotations

import statistics

from megaconsa.evaluation import picture
from megaconsa.evaluation.record import Evaluation, Metric, ModelRecord
from megaconsa.report.comparison import ABSENT, Estimate, Table
from megaconsa.reporting.plot_style import COLUMN, HEIGHT, Drawing, new_figure

MAP_HEIGHT = 3.0


def evaluation_table(evaluation: Evaluation) -> Table:
    """Returns a row for each model, with its figures over all positions, lengths and depths."""
    base = next(iter(evaluation.models), "")
    headings = ["model", "windowed heads"]
    if any(model.perplexity for model in evaluation.models.values()):
        headings += ["loss, nats per token", "perplexity"]
    if evaluation.differences:
        headings.append(f"loss - {base}")
    if any(model.needle for model in evaluation.models.values()):
        headings += ["needles found", "gain by the needle, nats"]
    tasks = _tasks(evaluation)
    headings += [f"{task} ({metric})" for task, metric in tasks]
    rows = []
    for label, model in evaluation.models.items():
        cells = {"model": label, "windowed heads": _windowed(model)}
        if model.perplexity is not None:
            overall = model.perplexity.overall
            cells["loss, nats per token"] = Estimate(overall.loss, overall.standard_error).text()
            cells["perplexity"] = f"{overall.perplexity:.4g}"
        difference = evaluation.differences.get(label)
        if difference is not None:
            estimate = Estimate(difference.overall_loss, difference.overall_standard_error)
            cells[f"loss - {base}"] = estimate.text("+")
        if model.needle:
            found = statistics.mean(cell.exact_match for cell in model.needle)
            gain = statistics.mean(cell.margin for cell in model.needle)
            cells["needles found"] = f"{found:.0%}"
            cells["gain by the needle, nats"] = f"{gain:+.3f}"
        for task, metric in tasks:
            cells[f"{task} ({metric})"] = _metric((model.harness or {}).get(task, {}).get(metric))
        rows.append([cells.get(heading, ABSENT) for heading in headings])
    return Table(headings, rows)


def evaluation_drawings(evaluation: Evaluation) -> list[Drawing]:
    """Draws the parts that have been measured. A map of needles for each model."""
    found = []
    models = evaluation.models
    base = next(iter(models), "")
    if any(model.perplexity for model in models.values()):
        figure, (axis,) = new_figure(COLUMN, HEIGHT)
        picture.draw_perplexity(axis, evaluation)
        caption = (
            "Bars: one standard error over documents. Lower is better. From the dashed line on, "
            "windowed heads see less than full ones."
        )
        found.append(Drawing("Perplexity by position", caption, figure))
    if evaluation.differences:
        figure, (axis,) = new_figure(COLUMN, HEIGHT)
        picture.draw_differences(axis, evaluation)
        axis.set_ylabel("nats per token")
        caption = (
            f"On the same tokens, with paired errors. Below 0 a model is better than {base}. Good: "
            "no rise beyond the window."
        )
        found.append(Drawing(f"Loss minus that of {base}", caption, figure))
    largest = picture.largest_gain(evaluation)
    for label, model in models.items():
        if model.needle:
            figure, (axis,) = new_figure(COLUMN, MAP_HEIGHT)
            mesh = picture.draw_needle_map(axis, model.needle, largest)
            picture.draw_gain_bar(figure, mesh, [axis], largest, "bottom")
            caption = (
                "Numbers: needles found exactly. Colour: how much likelier the answer is with the "
                "needle than with another one. Good: blue everywhere. White: not seen at all."
            )
            found.append(Drawing(f"Needles: {label}", caption, figure))
    if any(model.harness for model in models.values()):
        figure, (axis,) = new_figure(COLUMN, HEIGHT)
        picture.draw_tasks(axis, evaluation)
        found.append(Drawing("Tasks", "Bars: one standard error.", figure))
    return found


def _windowed(model: ModelRecord) -> str:
    if model.window is None:
        return "none"
    return f"{model.sparsity:.1%}, window {model.window:,}"


def _tasks(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Returns every task with its first metric."""
    found: dict[str, str] = {}
    for model in evaluation.models.values():
        for task, metrics in (model.harness or {}).items():
            if metrics:
                found.setdefault(task, next(iter(metrics)))
    return list(found.items())


def _metric(metric: Metric | None) -> str:
    if metric is None or metric.value is None:
        return ABSENT
    return Estimate(metric.value, metric.standard_error).text()
