"""The graph of jobs. Each job runs in a separate process and may need other jobs first.

    start -> [score | learn] -> [first] -> train

A job is done when its result exists, so the graph of an interrupted study says what is left to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megaconsa import run_folder
from megaconsa.study.fields import Trial
from megaconsa.study.runs import Runs


@dataclass(frozen=True)
class Job:
    """One process of a study.

    start: trains the dense model.
    score: scores the units of the start checkpoint, once for all sparsities of an arm.
    learn: learns an allocation and finalises it.
    first: trains with a table on the schedule of learning. Arms that do not learn but have the
    whole budget need it.
    train: trains with a table and measures the model.
    """

    kind: Literal["start", "score", "learn", "first", "train"]
    name: str
    """Unique in the study. The log is OUT/logs/NAME.log."""
    result: Path
    """A file or folder that exists once the job is done. It is written last and in one piece."""
    needs: tuple[str, ...] = ()
    """Names of jobs that must be done before."""
    arm: str = ""
    """The arm of a score job."""
    trial: Trial | None = None
    """The trial of a learn, first or train job."""

    @property
    def done(self) -> bool:
        return self.result.exists()


START = "start"
"""Name of the start job."""


def graph(runs: Runs, trials: Sequence[Trial] | None = None) -> list[Job]:
    """Returns the jobs of some trials, each after those that it needs.

    trials: None means all.
    """
    chosen = runs.study.trials() if trials is None else trials
    jobs = {START: start_job(runs)}
    for trial in chosen:
        for job in _jobs_of(runs, trial):
            jobs[job.name] = job
    # Jobs that many others wait for come first.
    order = ("start", "score", "learn", "first", "train")
    return sorted(jobs.values(), key=lambda job: order.index(job.kind))


def start_job(runs: Runs) -> Job:
    """Returns the job that trains the dense model. Its result is the last checkpoint."""
    steps = runs.start_config.training.steps
    return Job("start", START, runs.start / run_folder.CHECKPOINTS / f"step_{steps}")


def _jobs_of(runs: Runs, trial: Trial) -> list[Job]:
    arm = runs.arm(trial)
    before = []
    if arm.kind == "score":
        result = runs.scores_file(trial.arm)
        before.append(Job("score", f"score-{trial.arm}", result, (START,), arm=trial.arm))
    if arm.kind == "learn":
        result = runs.allocation_file(trial)
        before.append(Job("learn", f"learn-{trial.name}", result, (START,), trial=trial))
    if runs.has_first_leg(trial):
        needs = (START, *(job.name for job in before))
        result = runs.first_file(trial)
        before.append(Job("first", f"first-{trial.name}", result, needs, trial=trial))
    needs = (START, *(job.name for job in before))
    train = Job("train", f"train-{trial.name}", runs.measures_file(trial), needs, trial=trial)
    return [*before, train]
