"""A profile as tables for the terminal. docs/profiling.md says how to read them.

    python -m megaconsa.benchmarks.profile.tables TRACE

prints the tables of one trace.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.table import Table
from rich.text import Text

from megaconsa.benchmarks.profile.analysis import Amount, Analysis, Work, analyse
from megaconsa.benchmarks.profile.attribution import Pass
from megaconsa.benchmarks.profile.idle import Cause
from megaconsa.benchmarks.profile.kernel_groups import group_of
from megaconsa.benchmarks.profile.trace import read_trace
from megaconsa.console import console, guarded

ROWS = 15
"""Kernels, operators or waits that a table shows."""
NAME_COLUMNS = 100
"""Characters of a kernel's name that a table shows."""

PASSES = (Pass.FORWARD, Pass.RECOMPUTED, Pass.BACKWARD)
"""Columns for the passes. What belongs to neither is in the total only."""


def step_table(ranks: list[Analysis]) -> Table:
    """How the steps of all ranks spend their time, a column for each rank."""
    names = [f"rank {rank}" for rank in range(len(ranks))] if len(ranks) > 1 else [""]
    table = _table("ms a step", *names)
    _add_figures(table, "step", [analysis.step_ms for analysis in ranks])
    devices = [analysis.device for analysis in ranks if analysis.device is not None]
    if len(devices) < len(ranks):
        return table
    steps = [analysis.step_ms for analysis in ranks]
    _add_figures(table, "GPU computes", [device.computing_ms for device in devices], steps)
    communication = [device.communicating_ms for device in devices]
    if any(communication):
        _add_figures(table, "GPU only communicates", communication, steps)
    _add_figures(table, "GPU idle", [device.idle_ms for device in devices], steps)
    for cause in Cause:
        values = [device.idle.get(cause, 0.0) for device in devices]
        if any(values):
            _add_figures(table, f"  {cause}", values, steps)
    table.add_row("launches", *(f"{device.launches:,.0f}" for device in devices))
    return table


def group_table(analysis: Analysis) -> Table:
    """Kernels by what they do."""
    table = _table("kernels", *PASSES, "ms", "share", "launches")
    whole = _sum(analysis)
    for group, work in analysis.groups.items():
        table.add_row(group, *_passes(work), *_amount(work.total, whole))
    return table


def name_table(analysis: Analysis) -> Table:
    """The kernels that take most time. Without a GPU, the operators."""
    on_device = analysis.device is not None
    table = _table("ms", "share", "launches" if on_device else "calls")
    if on_device:
        table.add_column("group", justify="left")
    table.add_column("kernel" if on_device else "operator", justify="left", overflow="fold")
    table.columns[0].justify = "right"
    whole = _sum(analysis)
    for name, amount in list(analysis.names.items())[:ROWS]:
        group = [group_of(name)] if on_device else []
        # A Text, because a name may look like markup.
        table.add_row(*_amount(amount, whole), *group, Text(_short(name)))
    return table


def part_table(analysis: Analysis) -> Table:
    """The parts of the step, by the time of what they launched."""
    on_device = analysis.device is not None
    names = ("launches", "idle before") if on_device else ("calls",)
    table = _table("part of the step", *PASSES, "ms", "share", *names)
    # So that it fits into 80 columns.
    table.padding = (0, 1, 0, 0)
    whole = _sum(analysis)
    for part, work in analysis.parts.items():
        idle = [_ms(work.idle_ms)] if on_device else []
        table.add_row(part, *_passes(work), *_amount(work.total, whole), *idle)
    return table


def wait_table(analysis: Analysis) -> Table:
    """The calls in which the host waits for the device."""
    table = _table("idle after", "ms in it", "calls")
    table.columns[0].justify = "right"
    for name in ("call", "operator", "place"):
        table.add_column(name, justify="left")
    for wait in analysis.waits[:ROWS]:
        figures = (_ms(wait.idle_ms), _ms(wait.ms), _count(wait.count))
        table.add_row(*figures, wait.call, wait.operator or "-", wait.place)
    return table


def print_tables(ranks: list[Analysis]) -> None:
    """Prints all tables. Those after the first are of rank 0."""
    for table in _tables(ranks):
        console.print(table)
        console.print()
    if ranks[0].device is None:
        console.print("no GPU: times are of operators on the CPU; kernels and waits need a GPU")


def _tables(ranks: list[Analysis]) -> list[Table]:
    first = ranks[0]
    if first.device is None:
        return [step_table(ranks), part_table(first), name_table(first)]
    return [
        step_table(ranks),
        group_table(first),
        name_table(first),
        part_table(first),
        wait_table(first),
    ]


def _table(first: str, *names: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(first, no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    return table


def _add_figures(
    table: Table, name: str, values: list[float], whole: list[float] | None = None
) -> None:
    """Adds a row of milliseconds, with their shares of `whole`."""
    if whole is None:
        table.add_row(name, *map(_ms, values))
        return
    shares = [value / all_ for value, all_ in zip(values, whole, strict=True)]
    figures = [f"{_ms(value)}  {share:6.1%}" for value, share in zip(values, shares, strict=True)]
    table.add_row(name, *figures)


def _passes(work: Work) -> list[str]:
    amounts = [work.passes.get(direction) for direction in PASSES]
    return ["-" if amount is None else _ms(amount.ms) for amount in amounts]


def _amount(amount: Amount, whole: float) -> tuple[str, str, str]:
    return _ms(amount.ms), f"{amount.ms / whole:.1%}", _count(amount.count)


def _sum(analysis: Analysis) -> float:
    """Milliseconds of all kernels or operators. Several may run at a time."""
    return sum(amount.ms for amount in analysis.names.values())


def _short(name: str) -> str:
    """A kernel's name without what many kernels have in common."""
    for part in ("void ", "at::native::", "(anonymous namespace)::"):
        name = name.replace(part, "")
    return name if len(name) <= NAME_COLUMNS else name[: NAME_COLUMNS - 1] + "…"


def _ms(value: float) -> str:
    return f"{value:,.2f}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"


if __name__ == "__main__":
    guarded(lambda: print_tables([analyse(read_trace(Path(sys.argv[1])))]))
