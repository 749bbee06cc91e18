"""Reads how far the jobs on a test cluster are."""

from __future__ import annotations

from pathlib import Path

from tests.support.slurm_cluster import Cluster, await_until

LONG = {"training": {"steps": 120}, "checkpoint": {"every": 20}}
"""Long enough to be interrupted in the middle."""


def number(printed: str) -> str:
    """Extracts Slurm's number from the line `train: job 12` that submit prints."""
    return printed.partition(": job ")[2].split()[0]


def log(run: Path) -> str:
    (path,) = (run / "slurm").glob("*.out")
    return path.read_text()


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def running_at(cluster: Cluster, run: Path, step: int) -> None:
    await_until(lambda: steps(run) >= step, f"step {step} of {run}", 120, lambda: log(run))
