"""A benchmark of attention for the terminal: errors, times, and what to know about them."""

from __future__ import annotations

from rich.table import Table

from megaconsa.benchmarks.attention.benchmark import Benchmark
from megaconsa.benchmarks.attention.timing import Verdict


def errors_table(checked: dict[str, list[Verdict]]) -> Table:
    """Errors of those that ran."""
    names = ("out", "dq", "dk", "dv", "dz")
    table = _table("checked", *names)
    for case, verdicts in checked.items():
        table.add_row(f"[bold]{case}")
        for verdict in verdicts:
            if verdict.errors:
                errors = [
                    f"{verdict.errors[name]:.1e}" if name in verdict.errors else ""
                    for name in names
                ]
                table.add_row(f"  {verdict.contestant.name}", *errors)
    return table


def times_table(benchmark: Benchmark) -> Table:
    """Medians in milliseconds; ours in bold."""
    table = _table("milliseconds", "forward", "backward", "total", "TFLOP/s", "ratio", "error")
    case = ""
    for row in benchmark.rows:
        if row.case != case:
            table.add_row(f"[bold]{row.case}")
        case = row.case
        name = f"  {row.contestant}" + (f" x {row.launches}" if row.launches > 1 else "")
        times = [f"{x:.3f}" for x in (row.forward.median, row.backward.median, row.total_ms)]
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(
            name,
            *times,
            f"{row.tflops:.3g}",
            ratio,
            f"{row.error:.1e}",
            style="bold" if row.ours else None,
        )
    return table


def footer(benchmark: Benchmark) -> list[str]:
    """Lines below the table: what the cases are, ratios with their goals, who is missing and why."""
    lines = [
        "TFLOP/s: visible pairs only. ratio: total over the fastest peer's of the case. error: the largest of out, dq, dk, dv, dz.",
        "x 2: two launches, on heads split by window beforehand; with gates full and windowed, not yet put together.",
        "Windowed and full heads alternate; flash gets them sorted, its peers split. Every contestant has its own layout, contiguous.",
    ]
    lines += [f"{case.name}: {case.description}" for case in benchmark.cases]
    for ratio in benchmark.ratios:
        goal = "" if ratio.goal is None else f" (goal <= {ratio.goal:.2f})"
        lines.append(f"{ratio.name} = {ratio.value:.3f}{goal}")
    reasons: dict[tuple[str, str], list[str]] = {}
    for left in benchmark.left:
        reasons.setdefault((left.contestant, left.reason), []).append(left.case)
    lines += [
        f"not timed: {name} ({', '.join(cases)}): {reason}"
        for (name, reason), cases in reasons.items()
    ]
    return lines


def _table(first: str, *figures: str) -> Table:
    table = Table(first, box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for name in figures:
        table.add_column(name, justify="right")
    return table
