"""Runs a study from its file to its table: checks, jobs, results."""

from __future__ import annotations

from pathlib import Path

from megaconsa.console import console
from megaconsa.errors import InputError
from megaconsa.exit_codes import DONE
from megaconsa.study import checks, page, record, results, settings, table
from megaconsa.study.jobs import START, Job, graph, start_job
from megaconsa.study.runner import Runner, Stopped, visible_devices
from megaconsa.study.runs import Runs

PAGE = "study.html"


def open_study(path: Path, out: Path) -> Runs:
    """Reads a study and checks it, alone and against the content of its folder.

    It writes nothing. Raises InputError if the study is refused.
    """
    runs = Runs(settings.load(path), out)
    checks.check(runs)
    record.check(runs)
    return runs


def list_trials(runs: Runs) -> None:
    """Prints the trials with their indices."""
    for index, trial in enumerate(runs.study.trials()):
        console.print(f"{index:>4}  {trial.name}", markup=False)


def run_all(runs: Runs, at_once: int | None) -> int:
    """Runs what is left of the study, then writes the table and the page.

    at_once: jobs in parallel. None is one for each visible GPU, or one on a CPU.

    Returns the exit code.
    """
    code = _run_jobs(runs, graph(runs), at_once)
    _write_results(runs)
    return code


def run_only(runs: Runs, entry: str) -> int:
    """Runs one trial, or the start, and returns the exit code.

    entry: index of the trial, or START.

    Raises InputError for an unknown entry, or if a trial needs a start that does not exist.
    """
    start = start_job(runs)
    if entry == START:
        return _run_jobs(runs, [start], 1)
    trials = runs.study.trials()
    if not entry.isdigit() or int(entry) >= len(trials):
        raise InputError(
            f"--only {entry} is not an entry; choose {START}, or 0 to {len(trials) - 1} of --list",
        )
    if not start.done:
        raise InputError(
            f"--only {entry} needs the start checkpoint {start.result}; run --only {START} first",
        )
    return _run_jobs(runs, graph(runs, [trials[int(entry)]]), 1)


def _run_jobs(runs: Runs, jobs: list[Job], at_once: int | None) -> int:
    record.save(runs)
    devices = visible_devices()
    runner = Runner(runs, jobs, devices, at_once or max(1, len(devices)))
    try:
        code = runner.run()
    except Stopped as stopped:
        return int(stopped.args[0])
    for name, reason in runner.failed.items():
        console.print(f"failed: {name}: {reason}", markup=False)
    if code != DONE:
        console.print("the same command resumes the study", markup=False)
    return code


def _write_results(runs: Runs) -> None:
    rows = results.collect(runs)
    if not rows:
        return
    missing = sum(not runs.measures_file(trial).exists() for trial in runs.study.trials())
    table.write(rows, runs.out)
    page.write_page(runs.study, runs.out.resolve().name, rows, runs.out / PAGE, missing)
    console.print(table.aligned(rows), markup=False)
    console.print(table.NOTE, markup=False)
    console.print(
        f"wrote {runs.out / 'results.json'}, results.csv, results.md and {PAGE}",
        markup=False,
    )
