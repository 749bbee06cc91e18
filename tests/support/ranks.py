"""Starts two ranks as srun does.

A test may signal, stop and kill them. If one rank ends, nothing else ends the other one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megaconsa.parallel.launcher import VARIABLES, free_port
from megaconsa.reporting.metrics import read_metrics
from tests.support.forked import Forked, run_command

Task = subprocess.Popen[str] | Forked
TRAIN = ("-m", "megaconsa.train")
PATIENCE_SECONDS = 120


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def environment(**variables: str) -> dict[str, str]:
    """Returns the environment without what earlier trainings in this process left behind."""
    return (
        {name: value for name, value in os.environ.items() if name not in VARIABLES}
        | {"OMP_NUM_THREADS": "1"}
        | variables
    )


def write(values: dict[str, Any], folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(
    config: Path,
    command: Sequence[str] = TRAIN,
    tasks: int = 2,
    device: str = "cpu",
    fresh: bool = False,
) -> list[Task]:
    """Starts tasks with the variables that srun sets.

    device: the tasks see GPUs only if it is cuda.
    fresh: whether each task is a new interpreter, as with srun. Otherwise it is forked, which is
        faster.
    """
    gpus = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    step = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": str(tasks),
    }
    # The port that follows from a job's number may be taken on a machine without Slurm.
    port = {"MASTER_PORT": free_port()}
    started: list[Task] = []
    for rank in range(tasks):
        place = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        variables = environment(**step, **port, **gpus, **place)
        arguments = [*command, str(config)]
        if fresh:
            started.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    env=variables,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        else:
            started.append(Forked(run_command, arguments, environment=variables))
    return started


def ended(tasks: Sequence[Task], patience: float = PATIENCE_SECONDS) -> list[Ended]:
    """Waits for all tasks.

    Kills the remaining ones after `patience` seconds and fails.
    """
    deadline = time.monotonic() + patience
    try:
        outputs = [task.communicate(timeout=deadline - time.monotonic()) for task in tasks]
    finally:
        for task in tasks:
            task.kill()
    codes = [task.wait() for task in tasks]
    return [Ended(code, *output) for code, output in zip(codes, outputs, strict=True)]


def await_step(run: Path, step: int) -> None:
    """Waits until the run has written the metrics of that step."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        rows = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
        if rows and rows[-1]["step"] >= step:
            return
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.05)
