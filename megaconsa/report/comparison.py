"""Compares runs: their final figures, the settings that differ, and losses minus a baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from megaconsa.errors import InputError
from megaconsa.report.runs import Run
from megaconsa.reporting.metrics import last, series

FINAL_SHARE = 0.1
"""Share of a run's steps at its end over which a final training loss is averaged."""
LEAST_FINAL_STEPS = 5
NO_RESULT = ("run.dir", "checkpoint.", "logging.", "watchdog.", "data.workers")
"""Beginnings of settings that do not change what a run computes."""
ABSENT = "-"

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error, which is None if there are too few values for it."""

    value: float
    error: float | None

    def text(self, sign: str = "") -> str:
        """The value to four digits, with its error."""
        shown = f"{self.value:{sign}.4f}"
        return shown if self.error is None else f"{shown} ± {self.error:.4f}"


@dataclass(frozen=True)
class Table:
    """A table of text: a heading for each column, and rows of as many cells."""

    headings: list[str]
    rows: list[list[str]]


def summary(runs: Sequence[Run], baseline: Run | None) -> Table:
    """Returns a row of final figures for each run."""
    headings = [
        *("run", "continues", "windowed heads", "tokens", "training loss", "validation loss"),
        *("tokens/s", "MFU", "time in steps"),
    ]
    if baseline is not None:
        headings[6:6] = [f"training - {baseline.name}", f"validation - {baseline.name}"]
    rows = []
    for run in runs:
        cells = [
            run.name,
            run.continues or ABSENT,
            _windowed(run),
            amount(last(run.rows, "tokens")),
            _text(final_loss(run)),
            number(last(run.rows, "validation_loss"), ".4f"),
            number(_median(run, "tokens_per_second"), ",.0f"),
            number(_median(run, "mfu"), ".1%"),
            duration(float(series(run.rows, "step_seconds")[1].sum())),
        ]
        if baseline is not None:
            cells[6:6] = _differences(run, baseline)
        rows.append(cells)
    # A column in which no run has anything says nothing.
    shown = [
        column
        for column in range(len(headings))
        if any(row[column] not in (ABSENT, "") for row in rows)
    ]
    return Table(
        [headings[column] for column in shown], [[row[column] for column in shown] for row in rows]
    )


def differing_settings(runs: Sequence[Run]) -> Table:
    """Returns the settings that are not the same in all runs, a row each and a column a run.

    Settings that do not change what a run computes are left out.
    """
    configured = [run for run in runs if run.config is not None]
    each = [dict(settings(run)) for run in configured]
    names = list(dict.fromkeys(name for values in each for name in values))
    rows = []
    for name in names:
        values = [setting.get(name, ABSENT) for setting in each]
        if len(set(values)) > 1 and not name.startswith(NO_RESULT):
            rows.append([name, *values])
    return Table(["setting", *(run.name for run in configured)], rows)


def settings(run: Run) -> list[tuple[str, str]]:
    """Returns dotted names and values, spelled like overrides on the command line."""
    return _flatten(run.config.to_dict()) if run.config else []


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _flatten(value, f"{prefix}{key}.")
        elif value is not None:
            text = yaml.safe_dump(value, default_flow_style=True)
            # YAML ends a plain scalar with a document end marker.
            text = text.removesuffix("\n...\n").strip()
            found.append((prefix + key, text))
    return found


def choose_baseline(runs: Sequence[Run], name: str | None) -> Run | None:
    """Returns the run from which the others are subtracted.

    name: the name of the run. None takes the first dense run that shares its tokens with another
        one, or else the first on a fixed allocation, or else the first. If no runs share tokens,
        the result is None.

    Raises InputError if no run has this name.
    """
    if name is not None:
        for run in runs:
            if run.name == name:
                return run
        names = ", ".join(run.name for run in runs)
        raise InputError(f"--baseline {name} is none of the runs; choose one of {names}")
    for run in sorted(runs, key=lambda run: (not _is_dense(run), run.learning)):
        others = [other for other in runs if other is not run]
        if any(len(loss_difference(other, run, "loss")[0]) for other in others):
            return run
    return None


def _is_dense(run: Run) -> bool:
    return not run.learning and run.allocation is not None and run.allocation.sparsity == 0


def loss_difference(run: Run, baseline: Run, field: str) -> tuple[Floats, Floats]:
    """Returns tokens, and a loss of `run` minus that of the baseline, where both have it.

    Between two values of the baseline, a straight line is taken. Runs on the same batches are
    compared batch by batch, so that most of the noise cancels.

    field: `loss` or `validation_loss`.
    """
    tokens, values = placed(run, field)
    base_tokens, base_values = placed(baseline, field)
    if not len(tokens) or not len(base_tokens):
        return tokens[:0], values[:0]
    inside = (tokens >= base_tokens[0]) & (tokens <= base_tokens[-1])
    tokens = tokens[inside]
    return tokens, values[inside] - np.interp(tokens, base_tokens, base_values)


def placed(run: Run, field: str) -> tuple[Floats, Floats]:
    """Returns tokens and values of a field, counting the tokens of the runs that it continues."""
    tokens, values = series(run.rows, field, "tokens")
    return tokens + run.tokens_before, values


def final_loss(run: Run) -> Estimate | None:
    """Returns the mean training loss of the last steps."""
    return estimate(_final(series(run.rows, "loss")[1]))


def estimate(values: Floats) -> Estimate | None:
    """Returns the mean, and its standard error around a straight line through the values."""
    count = len(values)
    if not count:
        return None
    mean = float(values.mean())
    if count < LEAST_FINAL_STEPS:
        return Estimate(mean, None)
    places = np.arange(count) - (count - 1) / 2
    slope = float(places @ values) / float(places @ places)
    rest = values - mean - slope * places
    deviation = math.sqrt(float(rest @ rest) / (count - 2))
    return Estimate(mean, deviation / math.sqrt(count))


def _final(values: Floats) -> Floats:
    return values[-max(LEAST_FINAL_STEPS, round(FINAL_SHARE * len(values))) :]


def _differences(run: Run, baseline: Run) -> list[str]:
    """Returns two cells: the final differences of training loss and of validation loss."""
    if run is baseline:
        return ["baseline", "baseline"]
    training = estimate(_final(loss_difference(run, baseline, "loss")[1]))
    validation = loss_difference(run, baseline, "validation_loss")[1]
    return [
        _text(training, "+"),
        f"{validation[-1]:+.4f}" if len(validation) else ABSENT,
    ]


def _windowed(run: Run) -> str:
    if run.allocation is None:
        return ABSENT
    if run.allocation.sparsity == 0:
        return "none"
    return f"{run.allocation.sparsity:.1%}, window {run.allocation.window:,}"


def _median(run: Run, field: str) -> float | None:
    values = series(run.rows, field)[1]
    return statistics.median(values) if len(values) else None


def _text(found: Estimate | None, sign: str = "") -> str:
    return ABSENT if found is None else found.text(sign)


def number(value: float | None, form: str) -> str:
    """The value as text, or a dash if there is none."""
    return ABSENT if value is None else f"{value:{form}}"


def amount(tokens: float | None) -> str:
    """A number of tokens as text, to four digits."""
    if tokens is None:
        return ABSENT
    for factor, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if tokens >= factor:
            return f"{tokens / factor:.4g} {name}"
    return f"{tokens:,.0f}"


def duration(seconds: float) -> str:
    """A time as text, in hours and minutes or in minutes and seconds."""
    hours, rest = divmod(round(seconds), 3600)
    if hours:
        return f"{hours} h {rest // 60:02} min"
    return f"{rest // 60} min {rest % 60:02} s"
