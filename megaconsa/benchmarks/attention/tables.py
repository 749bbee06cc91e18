"""The results of `bench-attention` for the terminal: errors, times, and how to read them."""

from __future__ import annotations

from rich.table import Table

from megaconsa.benchmarks.attention.benchmark import Benchmark
from megaconsa.benchmarks.attention.timing import Verdict


def errors_table(checked: dict[str, list[Verdict]]) -> Table:
    """Returns the errors of the contestants that ran.

    checked: verdicts by case.
    """
    names = ("out", "dq", "dk", "dv", "dz")
    table = _table("checked", *names)
    for case, verdicts in checked.items():
        table.add_row(f"[bold]{case}")
        for verdict in verdicts:
            if not verdict.errors:
                continue
            cells = []
            for name in names:
                cells.append(f"{verdict.errors[name]:.1e}" if name in verdict.errors else "")
            table.add_row(f"  {verdict.contestant.name}", *cells)
    return table


def times_table(benchmark: Benchmark) -> Table:
    """Returns the median times in milliseconds, with our backends in bold."""
    table = _table("milliseconds", "forward", "backward", "total", "TFLOP/s", "ratio", "error")
    case = ""
    for row in benchmark.rows:
        if row.case != case:
            table.add_row(f"[bold]{row.case}")
        case = row.case
        name = f"  {row.contestant}"
        if row.launches > 1:
            name += f" x {row.launches}"
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(
            name,
            f"{row.forward.median:.3f}",
            f"{row.backward.median:.3f}",
            f"{row.total_ms:.3f}",
            f"{row.tflops:.3g}",
            ratio,
            f"{row.error:.1e}",
            style="bold" if row.ours else None,
        )
    return table


def footer(benchmark: Benchmark) -> list[str]:
    """Returns the lines below the table.

    They describe the columns and the cases, give the ratios with their goals, and say who is not
    timed and why.
    """
    lines = [
        "TFLOP/s: visible pairs only. ratio: total over the fastest peer's of the case. "
        "error: the largest of out, dq, dk, dv, dz.",
        "x 2: two launches, on heads split by window beforehand; "
        "with gates full and windowed, not yet put together.",
        "Windowed and full heads alternate; flash gets them sorted, its peers split. "
        "Every contestant has its own layout, contiguous.",
    ]
    lines += [f"{case.name}: {case.description}" for case in benchmark.cases]
    for ratio in benchmark.ratios:
        goal = "" if ratio.goal is None else f" (goal <= {ratio.goal:.2f})"
        lines.append(f"{ratio.name} = {ratio.value:.3f}{goal}")
    # One line for each contestant and reason, with all the cases it holds for.
    cases_left: dict[tuple[str, str], list[str]] = {}
    for left in benchmark.left:
        cases_left.setdefault((left.contestant, left.reason), []).append(left.case)
    for (name, reason), cases in cases_left.items():
        lines.append(f"not timed: {name} ({', '.join(cases)}): {reason}")
    return lines


def _table(first: str, *figures: str) -> Table:
    table = Table(first, box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for name in figures:
        table.add_column(name, justify="right")
    return table
