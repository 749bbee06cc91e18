"""The runs of a report as a table for the terminal, one row each."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from megaconsa.report.comparison import final_loss
from megaconsa.report.runs import Run
from megaconsa.reporting.metrics import last
from megaconsa.tables import Cell, Row, Table


def run_table(runs: Sequence[Run]) -> Table:
    """Returns steps, tokens, losses, sparsity and speed of each run."""
    headings = ("run", "stage", "step", "tokens", "loss", "validation", "sparsity", "tokens/s")
    table = Table(headings, left=(0, 1))
    for run in runs:
        newest = run.rows[-1]
        sparsity = None if run.allocation is None else run.allocation.sparsity
        speed = median(row["tokens_per_second"] for row in run.rows)
        cells = (
            run.name,
            "learns" if run.learning else "trains",
            Cell(f"{newest['step']:,}", newest["step"]),
            Cell(f"{newest['tokens']:,}", newest["tokens"]),
            _loss(run),
            _figure(last(run.rows, "validation_loss"), ".4f"),
            _figure(sparsity, ".3g"),
            _figure(speed, ",.0f"),
        )
        table.rows.append(Row(cells))
    return table


def _loss(run: Run) -> Cell:
    """The mean loss of the last steps, with its standard error."""
    loss = final_loss(run)
    if loss is None:
        return Cell("-")
    if loss.error is None:
        return Cell(f"{loss.value:.4f}", loss.value)
    return Cell(f"{loss.value:.4f} ±{loss.error:.4f}", loss.value, loss.error)


def _figure(value: float | None, form: str) -> Cell:
    return Cell("-") if value is None else Cell(format(value, form), value)
