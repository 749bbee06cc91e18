"""An evaluation for the terminal: a column for each model."""

from __future__ import annotations

import math
from itertools import pairwise

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
        lines.append(
            "perplexity: by position in the document; loss in nats a token, on the same tokens; ± standard error over documents."
        )
    if settings.needle is not None:
        lines.append(
            "needle: answers that greedy decoding gives, and nats that the answer gains by the needle; mean over depths."
        )
    return lines


def _kind(model: ModelRecord) -> str:
    return "none" if model.window is None else f"{model.sparsity:.3g}, window {model.window:,}"


def _perplexity_rows(table: Table, evaluation: Evaluation) -> None:
    measured = {label: model.perplexity for label, model in evaluation.models.items() if model.perplexity is not None}
    if not measured:
        return
    first = next(iter(measured.values()))
    buckets = zip(pairwise(first.edges), first.tokens, strict=True)
    names = [f"  {begin:,}-{end - 1:,} [dim]({tokens:,})[/]" for (begin, end), tokens in buckets]
    table.add_row("[bold]perplexity[/] [dim](tokens)[/]")
    for bucket, name in enumerate(names):
        cells = []
        for label in evaluation.models:
            result = measured.get(label)
            if result is None:
                cells.append("")
                continue
            value, error = result.perplexity[bucket], result.standard_error[bucket]
            cells.append(f"{value:.4g}{_error(None if error is None else value * error, '.3g')}")
        table.add_row(name, *cells)
    if evaluation.differences:
        table.add_row(f"[bold]loss less that of {next(iter(evaluation.models))}")
        for bucket, name in enumerate(names):
            differences = [evaluation.differences.get(label) for label in evaluation.models]
            cells = [f"{d.loss[bucket]:+.4f}{_error(d.standard_error[bucket], '.4f')}" if d else "" for d in differences]
            table.add_row(name, *cells)


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
        table.add_row(f"  {task} [dim]({name})[/]", *cells)


def _error(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else f" ±{value:{form}}"
