"""Finds runs and evaluations in a folder, and reads what the report needs of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megaconsa import config as configuration
from megaconsa import run_folder
from megaconsa.config import Config
from megaconsa.consa.allocation import Allocation
from megaconsa.errors import InputError
from megaconsa.evaluation import record
from megaconsa.evaluation.record import Evaluation
from megaconsa.files import parse_json
from megaconsa.planning.assumptions import planned_allocation
from megaconsa.provenance import Start, load_starts
from megaconsa.reporting.metrics import Row, read_metrics
from megaconsa.reporting.samples import Samples, read_samples

NOT_SEARCHED = {
    *(run_folder.CHECKPOINTS, run_folder.FAILURES, run_folder.INCIDENT_STACKS),
    *("tensorboard", "wandb"),
}
"""Folders that never hold runs, but may hold very many files."""


@dataclass(frozen=True)
class Run:
    """The files of a run folder that the report uses. A file that does not exist is None."""

    name: str
    folder: Path
    rows: list[Row]
    config: Config | None
    allocation: Allocation | None
    """The finished table, or the table that the current gates would give."""
    gates: dict[str, Any] | None
    starts: list[Start]
    samples: Samples
    tokens_before: float = 0.0
    """Tokens of the runs in the report that this one continues."""
    continues: str | None = None
    """Name of the run in the report from whose weights this one began."""

    @property
    def learning(self) -> bool:
        """Whether the run learns its allocation."""
        if self.config:
            return self.config.learning
        return "expected_sparsity" in self.rows[-1]

    @property
    def kind(self) -> str:
        """What the run does, in words."""
        if self.learning:
            return "learns its allocation"
        return "trains on a fixed allocation"


@dataclass(frozen=True)
class LeftOut:
    """A folder that looks like a run or an evaluation, but is not in the report."""

    folder: Path
    reason: str


@dataclass(frozen=True)
class Found:
    """What a folder holds. Runs that learn come first. Otherwise the order is by name."""

    runs: list[Run]
    evaluations: list[tuple[str, Evaluation]]
    """Name of the folder, and what evaluation.json in it says."""
    left_out: list[LeftOut]


def find_runs(folder: Path) -> Found:
    """Reads the run in `folder`, and all runs and evaluations in the folders below it.

    Raises InputError if no run can be reported.
    """
    if not folder.is_dir():
        raise InputError(f"run {folder} does not exist")
    runs: list[Run] = []
    evaluations: list[tuple[str, Evaluation]] = []
    left_out: list[LeftOut] = []
    for place in _folders(folder):
        name = place.relative_to(folder).as_posix()
        if name == ".":
            name = folder.resolve().name
        try:
            if (place / run_folder.METRICS).is_file():
                runs.append(_read_run(place, name))
            if (place / record.FILE).is_file():
                evaluations.append((name, Evaluation.load(place / record.FILE)))
        except InputError as error:
            left_out.append(LeftOut(place, str(error)))
    if not runs:
        if left_out:
            first = left_out[0]
            raise InputError(f"{folder} has nothing to report: {first.folder}: {first.reason}")
        raise InputError(
            f"{folder} is not a run folder: neither it nor a folder below it holds metrics.jsonl"
        )
    runs.sort(key=lambda run: not run.learning)
    return Found(_linked(runs), evaluations, left_out)


def _folders(root: Path) -> Iterator[Path]:
    """Yields `root` and the folders below it, by name. A folder with several links comes once."""
    seen = set()
    for place, names, _ in os.walk(root, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            names.clear()
            continue
        seen.add(real)
        names[:] = sorted(
            name for name in names if name not in NOT_SEARCHED and not name.startswith(".")
        )
        yield Path(place)


def _read_run(folder: Path, name: str) -> Run:
    """Raises InputError if a file of the run cannot be read, or no step has ended."""
    rows = read_metrics(folder / run_folder.METRICS)
    if not rows:
        raise InputError("no step has ended")
    path = folder / run_folder.CONFIG
    config = configuration.load(path) if path.is_file() else None
    gates = _read_gates(folder / run_folder.GATES)
    allocation = _read_allocation(folder, config, gates)
    starts = load_starts(folder)
    return Run(name, folder, rows, config, allocation, gates, starts, read_samples(folder))


def _read_gates(path: Path) -> dict[str, Any] | None:
    """Raises InputError if the file has no tables of scores and probabilities."""
    if not path.is_file():
        return None
    try:
        gates = parse_json(path.read_text())
        for name in ("scores", "probability_full"):
            torch.tensor(gates[name], dtype=torch.float64).reshape(len(gates[name]), -1)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"gates {path} cannot be read: {error}") from None
    return gates


def _read_allocation(
    folder: Path, config: Config | None, gates: dict[str, Any] | None
) -> Allocation | None:
    """Returns the allocation of a run, or None if its folder does not say which one it is."""
    if (folder / run_folder.ALLOCATION).is_file():
        return Allocation.load(folder / run_folder.ALLOCATION)
    if config is None:
        return None
    if config.learning:
        if gates is None:
            return None
        scores = torch.tensor(gates["scores"], dtype=torch.float64)
        return Allocation.from_scores(scores, config.constraint(), config.attention.window)
    file = config.allocation.file
    if file is not None and not file.is_file():
        # The run folder was moved away from its table.
        return None
    return planned_allocation(config)


def _linked(runs: Sequence[Run]) -> list[Run]:
    """Returns the runs with the tokens of those that they continue."""
    by_folder = {run.folder.resolve(): index for index, run in enumerate(runs)}
    return [_with_origin(run, runs, by_folder) for run in runs]


def _with_origin(run: Run, runs: Sequence[Run], by_folder: dict[Path, int]) -> Run:
    tokens = 0.0
    first: str | None = None
    current = run
    visited = {run.folder.resolve()}
    while (begin := _origin(current, by_folder)) is not None:
        index, step = begin
        current = runs[index]
        if current.folder.resolve() in visited:
            break
        visited.add(current.folder.resolve())
        first = first or current.name
        tokens += _tokens_at(current.rows, step)
    return replace(run, tokens_before=tokens, continues=first)


def _origin(run: Run, by_folder: dict[Path, int]) -> tuple[int, int | None] | None:
    """Returns the number of the run that `run` began from, and the step of the checkpoint.

    The step is None for the newest checkpoint. None if the run began from none of these runs.
    """
    if run.config is None or run.config.model.init_from is None:
        return None
    place = Path(run.config.model.init_from).resolve()
    if place in by_folder:
        return by_folder[place], None
    # A checkpoint is RUN/checkpoints/step_N.
    name = place.name.removeprefix("step_")
    if name.isdigit() and place.parent.parent in by_folder:
        return by_folder[place.parent.parent], int(name)
    return None


def _tokens_at(rows: Sequence[Row], step: int | None) -> float:
    """Returns the tokens after a step, or at the end if `step` is None."""
    for row in reversed(rows):
        if step is None or row["step"] <= step:
            return float(row.get("tokens") or 0.0)
    return 0.0
