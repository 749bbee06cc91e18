"""An evaluation for the terminal: a column for each model."""

from __future__ import annotations

import math

from rich.table import Table

from megaconsa.reporting.evaluation_record import Evaluation, ModelRecord


def evaluation_table(evaluation: Evaluation) -> Table:
    """Perplexity by position, needles by length, and tasks, of all models beside one another."""
    models = list(evaluation.models.values())
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for label in evaluation.models:
        table.add_column(label, justify="right")
    table.add_row("windowed heads", *(_kind(model) for model in models))
    _perplexity_rows(table, evaluation)
    _needle_rows(table, models)
    _harness_rows(table, models)
    return table


def footer(evaluation: Evaluation) -> list[str]:
    """Lines below the table: what its figures are."""
    settings, lines = evaluation.settings, []
    if settings.perplexity is not None:
        first = next(iter(evaluation.models))
        lines.append("perplexity: position in the document. +/-: standard error over documents.")
        if evaluation.differences:
            lines.append(f"In brackets: loss less that of {first} on the same tokens, nats a token.")
    if settings.needle is not None:
        lines.append(
            "needle: answers that greedy decoding gives, and nats that the answer gains by the needle; mean over depths."
        )
    return lines


def _kind(model: ModelRecord) -> str:
    return "none" if model.window is None else f"{model.sparsity:.3g}, window {model.window:,}"


def _perplexity_rows(table: Table, evaluation: Evaluation) -> None:
    measured = [model.perplexity for model in evaluation.models.values() if model.perplexity is not None]
    if not measured:
        return
    table.add_row("[bold]perplexity")
    edges = measured[0].edges
    for bucket, tokens in enumerate(measured[0].tokens):
        cells = []
        for label, model in evaluation.models.items():
            if model.perplexity is None:
                cells.append("")
                continue
            value, error = model.perplexity.perplexity[bucket], model.perplexity.standard_error[bucket]
            cell = f"{value:.4g}" + ("" if error is None else f" +/- {value * error:.2g}")
            if label in evaluation.differences:
                difference = evaluation.differences[label]
                cell += f" ({difference.loss[bucket]:+.4f}{_error(difference.standard_error[bucket], '.4f')})"
            cells.append(cell)
        documents = measured[0].documents[bucket]
        table.add_row(f"  {edges[bucket]:,}-{edges[bucket + 1] - 1:,} [dim]{tokens:,} tokens, {documents:,} documents[/]", *cells)


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
            exact, margin = (sum(values) / len(held) for values in zip(*((c.exact_match, c.margin) for c in held), strict=True))
            cells.append(f"{100 * exact:.0f} %, {margin:+.3f}")
        table.add_row(f"  {length:,} tokens", *cells)


def _harness_rows(table: Table, models: list[ModelRecord]) -> None:
    names = {(task, metric): None for model in models for task, metrics in (model.harness or {}).items() for metric in metrics}
    if names:
        table.add_row("[bold]tasks")
    for task, name in names:
        cells = []
        for model in models:
            metric = (model.harness or {}).get(task, {}).get(name)
            cells.append("" if metric is None else f"{metric.value:.4g}{_error(metric.standard_error, '.2g')}")
        table.add_row(f"  {task} [dim]{name}[/]", *cells)


def _error(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else f" +/- {value:{form}}"
