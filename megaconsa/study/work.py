"""The work of each job of a study. It runs in the job's own process."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megaconsa import config as configuration
from megaconsa import run_folder
from megaconsa.checkpoint import store
from megaconsa.checkpoint.gates import read_gates
from megaconsa.consa.allocation import Allocation
from megaconsa.evaluation.score_file import read_scores
from megaconsa.evaluation.settings import find_device
from megaconsa.evaluation.unit_scores import ScoreRequest, score_units
from megaconsa.exit_codes import DONE, STOPPED
from megaconsa.files import replace_text
from megaconsa.study.fields import Trial
from megaconsa.study.jobs import Job
from megaconsa.study.measures import measure_checkpoint
from megaconsa.study.runs import Runs
from megaconsa.train import train


def run(runs: Runs, job: Job) -> int:
    """Does the job, or what is left of it, and returns an exit code.

    If the code is 0, the result exists. Raises InputError and RunError from the parts.
    """
    if job.kind == "start":
        return _train(runs, runs.start_overrides())
    if job.kind == "score":
        with _alone(job.result):
            return DONE if job.done else _score(runs, job.arm)
    assert job.trial is not None
    works: dict[str, Callable[[Runs, Trial], int]] = {
        "learn": _learn,
        "first": _train_first,
        "train": _train_and_measure,
    }
    return works[job.kind](runs, job.trial)


def _train(runs: Runs, overrides: list[str]) -> int:
    """Trains a run to its end and returns an exit code."""
    code = train(runs.study.config, overrides)
    if code != DONE:
        return code
    config = configuration.load(runs.study.config, overrides)
    newest = store.committed(config.run.dir)[0]
    # A run that was stopped by the file RUN/stop ends with 0 too.
    finished = store.read(newest).step == config.training.steps
    return DONE if finished else STOPPED


def _score(runs: Runs, arm_name: str) -> int:
    arm = runs.study.arms[arm_name]
    assert arm.score is not None
    options = arm.options.model_dump(exclude_none=True)
    granularity = arm.granularity or runs.start_config.allocation.granularity
    request = ScoreRequest(arm.score, find_device("auto"), granularity, **options)
    scored = score_units(store.resolve(runs.start), request)
    replace_text(runs.scores_file(arm_name), json.dumps(scored.to_json()) + "\n")
    return DONE


@contextmanager
def _alone(result: Path) -> Iterator[None]:
    """Waits for any other process that makes the same result.

    Several tasks of a Slurm array may need the scores of one arm.
    """
    result.parent.mkdir(parents=True, exist_ok=True)
    with result.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _learn(runs: Runs, trial: Trial) -> int:
    code = _train(runs, runs.learn_overrides(trial))
    if code != DONE:
        return code
    run = runs.learn_folder(trial)
    bank = read_gates(store.resolve(run))
    origin = {"run": str(run), "controller": bank.settings.controller}
    table = Allocation.from_scores(bank.gates.scores, bank.constraint, bank.settings.window, origin)
    table.save(runs.allocation_file(trial))
    if not runs.arm(trial).whole_budget:
        _remove_checkpoints(run)
    return DONE


def _train_first(runs: Runs, trial: Trial) -> int:
    _save_table(runs, trial)
    code = _train(runs, runs.first_overrides(trial))
    if code == DONE:
        finished = {"checkpoint": str(store.resolve(runs.first_folder(trial)).path)}
        replace_text(runs.first_file(trial), json.dumps(finished) + "\n")
    return code


def _train_and_measure(runs: Runs, trial: Trial) -> int:
    _save_table(runs, trial)
    code = _train(runs, runs.train_overrides(trial))
    if code != DONE:
        return code
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    checkpoint = store.resolve(runs.train_folder(trial))
    measures = measure_checkpoint(checkpoint, runs.study.needles, find_device("auto"))
    measures.save(runs.measures_file(trial))
    _remove_checkpoints(runs.train_folder(trial))
    _remove_checkpoints(runs.learn_folder(trial))
    _remove_checkpoints(runs.first_folder(trial))
    return DONE


def _save_table(runs: Runs, trial: Trial) -> None:
    if not runs.allocation_file(trial).exists():
        _build_table(runs, trial).save(runs.allocation_file(trial))


def _build_table(runs: Runs, trial: Trial) -> Allocation:
    """Returns the table of an arm that does not learn one."""
    arm = runs.arm(trial)
    if arm.kind == "rule":
        return runs.rule_table(trial)
    if arm.file is not None:
        return Allocation.load(arm.file)
    constraint = runs.constraint(trial)
    scores = read_scores(runs.scores_file(trial.arm), constraint)
    window = runs.start_config.attention.window
    origin = {"score": arm.score, "start": str(runs.start)}
    return Allocation.from_scores(scores, constraint, window, origin)


def _remove_checkpoints(run: Path) -> None:
    """Removes the checkpoints, which are most of a run's bytes and are not read any more."""
    shutil.rmtree(run / run_folder.CHECKPOINTS, ignore_errors=True)
