"""Shows an evaluation in the terminal, with a column for each model."""

from __future__ import annotations

from itertools import pairwise

from rich.markup import escape
from rich.table import Table

from megaconsa.evaluation.record import (
    Difference,
    Evaluation,
    Metric,
    ModelRecord,
    Perplexity,
)


def evaluation_table(evaluation: Evaluation) -> Table:
    """Builds the table of all models: perplexity by position, needles by length, and tasks."""
    models = list(evaluation.models.values())
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for label in evaluation.models:
        table.add_column(escape(label), justify="right")
    table.add_row("windowed heads", *(_kind(model) for model in models))
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


def _kind(model: ModelRecord) -> str:
    return "none" if model.window is None else f"{model.sparsity:.3g}, window {model.window:,}"


def _perplexity_rows(table: Table, evaluation: Evaluation) -> None:
    measured = [model.perplexity for model in evaluation.models.values()]
    known = next((result for result in measured if result is not None), None)
    if known is None:
        return
    counts = zip(pairwise(known.edges), known.tokens, known.documents, strict=True)
    names = [
        f"  {begin:,}-{end - 1:,} [dim]({tokens:,} / {documents:,})[/]"
        for (begin, end), tokens, documents in counts
    ]
    names.append(f"  all [dim]({known.overall.tokens:,} / {len(known.document_tokens):,})[/]")
    table.add_row("[bold]perplexity[/] [dim](tokens / documents)[/]")
    columns = [_perplexities(result, len(names)) for result in measured]
    for name, *cells in zip(names, *columns, strict=True):
        table.add_row(name, *cells)
    if evaluation.differences:
        base = next(iter(evaluation.models))
        table.add_row(f"[bold]loss less that of {escape(base)}")
        columns = [
            _differences(evaluation.differences.get(label), len(names))
            for label in evaluation.models
        ]
        for name, *cells in zip(names, *columns, strict=True):
            table.add_row(name, *cells)


def _perplexities(result: Perplexity | None, count: int) -> list[str]:
    """Returns a model's column of `count` cells: the perplexity of each bucket and the overall one.

    The cells are blank if perplexity has not been measured.
    """
    if result is None:
        return [""] * count
    values = [*result.perplexity, result.overall.perplexity]
    errors = [*result.standard_error, result.overall.standard_error]
    cells = []
    for value, error in zip(values, errors, strict=True):
        # The errors are those of the loss. The derivative of exp(loss) is exp(loss).
        scaled = None if error is None else value * error
        cells.append(f"{value:.4g}{_error(scaled, '.3g')}")
    return cells


def _differences(result: Difference | None, count: int) -> list[str]:
    """Returns a model's column of `count` cells: the loss minus that of the first model."""
    if result is None:
        return [""] * count
    losses = [*result.loss, result.overall_loss]
    errors = [*result.standard_error, result.overall_standard_error]
    return [
        f"{loss:+.4f}{_error(error, '.4f')}" for loss, error in zip(losses, errors, strict=True)
    ]


def _needle_rows(table: Table, models: list[ModelRecord]) -> None:
    lengths = sorted({cell.length for model in models for cell in model.needle or []})
    if lengths:
        table.add_row("[bold]needle")
    for length in lengths:
        cells = []
        for model in models:
            held = [cell for cell in model.needle or [] if cell.length == length]
            if not held:
                cells.append("")
                continue
            exact = sum(cell.exact_match for cell in held) / len(held)
            margin = sum(cell.margin for cell in held) / len(held)
            cells.append(f"{100 * exact:.0f} %, {margin:+.3f}")
        table.add_row(f"  {length:,} tokens", *cells)


def _harness_rows(table: Table, models: list[ModelRecord]) -> None:
    # The keys of the dictionary are an ordered set.
    names: dict[tuple[str, str], None] = {}
    for model in models:
        for task, metrics in (model.harness or {}).items():
            for name in metrics:
                names[task, name] = None
    if names:
        table.add_row("[bold]tasks")
    for task, name in names:
        cells = []
        for model in models:
            metric = (model.harness or {}).get(task, {}).get(name)
            cells.append(_metric(metric) if metric else "")
        table.add_row(f"  {escape(task)} [dim]({escape(name)})[/]", *cells)


def _metric(metric: Metric) -> str:
    if metric.value is None:
        return "not finite"
    return f"{metric.value:.4g}{_error(metric.standard_error, '.2g')}"


def _error(value: float | None, form: str) -> str:
    return "" if value is None else f" ±{value:{form}}"
