"""An evaluation as a table, with a column for each model."""

from __future__ import annotations

from itertools import pairwise

from megaconsa.evaluation.record import (
    Difference,
    Evaluation,
    Metric,
    ModelRecord,
    Perplexity,
)
from megaconsa.tables import Cell, Row, Table


def evaluation_table(evaluation: Evaluation) -> Table:
    """Builds the table of all models: perplexity by position, needles by length, and tasks."""
    models = list(evaluation.models.values())
    table = Table(("", *evaluation.models))
    table.rows.append(Row(("windowed heads", *(_kind(model) for model in models))))
    _perplexity_rows(table, evaluation)
    _needle_rows(table, models)
    _harness_rows(table, models)
    return table


def footer(evaluation: Evaluation) -> list[str]:
    """Returns the lines below the table, which explain its figures."""
    settings = evaluation.settings
    lines = []
    if settings.perplexity is not None:
        lines.append(
            "perplexity: by position in the document; loss in nats a token, on the same tokens; "
            "± standard error over documents."
        )
    if settings.needle is not None:
        lines.append(
            "needle: answers that greedy decoding gives, "
            "and nats that the answer gains by the needle; mean over depths."
        )
    return lines


def _kind(model: ModelRecord) -> Cell:
    if model.window is None:
        return Cell("none", 0.0)
    return Cell(f"{model.sparsity:.3g}, window {model.window:,}", model.sparsity)


def _perplexity_rows(table: Table, evaluation: Evaluation) -> None:
    measured = [model.perplexity for model in evaluation.models.values()]
    known = next((result for result in measured if result is not None), None)
    if known is None:
        return
    counts = zip(pairwise(known.edges), known.tokens, known.documents, strict=True)
    names = [
        f"  {begin:,}-{end - 1:,} ({tokens:,} / {documents:,})"
        for (begin, end), tokens, documents in counts
    ]
    names.append(f"  all ({known.overall.tokens:,} / {len(known.document_tokens):,})")
    section = "perplexity (tokens / documents)"
    columns = [_perplexities(result, len(names)) for result in measured]
    for name, *cells in zip(names, *columns, strict=True):
        table.rows.append(Row((name, *cells), section=section))
    if evaluation.differences:
        base = next(iter(evaluation.models))
        section = f"loss less that of {base}"
        columns = [
            _differences(evaluation.differences.get(label), len(names))
            for label in evaluation.models
        ]
        for name, *cells in zip(names, *columns, strict=True):
            table.rows.append(Row((name, *cells), section=section))


def _perplexities(result: Perplexity | None, count: int) -> list[Cell]:
    """Returns a model's column of `count` cells: the perplexity of each bucket and the overall one.

    The cells are blank if perplexity has not been measured.
    """
    if result is None:
        return [Cell()] * count
    values = [*result.perplexity, result.overall.perplexity]
    errors = [*result.standard_error, result.overall.standard_error]
    cells = []
    for value, error in zip(values, errors, strict=True):
        # The errors are those of the loss. The derivative of exp(loss) is exp(loss).
        scaled = None if error is None else value * error
        cells.append(Cell(f"{value:.4g}{_error(scaled, '.3g')}", value, scaled))
    return cells


def _differences(result: Difference | None, count: int) -> list[Cell]:
    """Returns a model's column of `count` cells: the loss minus that of the first model."""
    if result is None:
        return [Cell()] * count
    losses = [*result.loss, result.overall_loss]
    errors = [*result.standard_error, result.overall_standard_error]
    return [
        Cell(f"{loss:+.4f}{_error(error, '.4f')}", loss, error)
        for loss, error in zip(losses, errors, strict=True)
    ]


def _needle_rows(table: Table, models: list[ModelRecord]) -> None:
    lengths = sorted({cell.length for model in models for cell in model.needle or []})
    for length in lengths:
        answers = []
        margins = []
        for model in models:
            held = [cell for cell in model.needle or [] if cell.length == length]
            if not held:
                answers.append(Cell())
                margins.append(Cell())
                continue
            exact = sum(cell.exact_match for cell in held) / len(held)
            margin = sum(cell.margin for cell in held) / len(held)
            answers.append(Cell(f"{100 * exact:.0f} %", exact))
            margins.append(Cell(f"{margin:+.3f}", margin))
        table.rows.append(Row((f"  {length:,} tokens, answers", *answers), section="needle"))
        table.rows.append(Row((f"  {length:,} tokens, margin", *margins), section="needle"))


def _harness_rows(table: Table, models: list[ModelRecord]) -> None:
    # The keys of the dictionary are an ordered set.
    names: dict[tuple[str, str], None] = {}
    for model in models:
        for task, metrics in (model.harness or {}).items():
            for name in metrics:
                names[task, name] = None
    for task, name in names:
        cells = []
        for model in models:
            metric = (model.harness or {}).get(task, {}).get(name)
            cells.append(_metric(metric) if metric else Cell())
        table.rows.append(Row((f"  {task} ({name})", *cells), section="tasks"))


def _metric(metric: Metric) -> Cell:
    if metric.value is None:
        return Cell("not finite")
    text = f"{metric.value:.4g}{_error(metric.standard_error, '.2g')}"
    return Cell(text, metric.value, metric.standard_error)


def _error(value: float | None, form: str) -> str:
    return "" if value is None else f" ±{value:{form}}"
