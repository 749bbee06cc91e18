"""Reads the status of a run from its folder alone.

It writes nothing, takes no lock and does not load torch, so that it can run at any time.
"""

from __future__ import annotations

import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml

from megaconsa import incidents, run_folder
from megaconsa.errors import InputError
from megaconsa.files import parse_json
from megaconsa.reporting.metrics import Row, last

TAIL_BYTES = 1 << 20
"""How much of the end of metrics.jsonl is read: a few thousand rows."""
RECENT = 50
"""Number of newest rows over which speeds are averaged."""
QUIET_STEPS = 10
QUIET_SECONDS = 60
"""A run on another machine is silent if its newest row is older than the sum of these two times.

The first is QUIET_STEPS steps at their usual duration.
"""
INCIDENTS = 5
"""Number of newest incidents that are shown."""


@dataclass(frozen=True)
class Status:
    """The status of a run. None means that the run has no such value, or none yet."""

    run: str
    state: str
    """One of training, finished, stopped and silent.

    The same command resumes a stopped run. The lock of a silent run says that it trains, but its
    files say that it does not.
    """
    holder: str | None
    """The process that holds the run's lock."""
    step: int
    steps: int
    tokens: int
    loss: float | None
    validation_loss: float | None
    tokens_per_second: float | None
    mfu: float | None
    expected_sparsity: float | None
    """Known only while learning."""
    target_sparsity: float | None
    """The target of the newest step while learning. Else the table's share of windowed heads."""
    skipped: int
    """Steps whose update was not applied."""
    seconds_since_step: float | None
    """Time since the newest row of metrics was written."""
    remaining_seconds: float | None
    """Remaining steps times the median duration of the newest ones. None unless it trains.

    Validation and checkpoints are not included.
    """
    checkpoint: dict[str, Any] | None
    """step, bytes and date of the newest checkpoint."""
    stop_requested: bool
    """Whether there is a stop file that the run has not obeyed yet."""
    incidents: list[dict[str, Any]]
    """The newest incidents, oldest first."""


def status(run: Path) -> Status:
    """Reads a run folder. Raises InputError if it is not a run folder."""
    try:
        config = yaml.safe_load((run / run_folder.CONFIG).read_text())
        steps = int(config["training"]["steps"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        raise InputError(f"{run} is not a run folder: it holds no config.yaml of a run") from None
    rows = newest_rows(run / run_folder.METRICS)
    recent = rows[-RECENT:]
    step = int(rows[-1]["step"]) if rows else 0
    usual_seconds = median(row["step_seconds"] for row in recent) if recent else None
    age = time.time() - (run / run_folder.METRICS).stat().st_mtime if rows else None
    checkpoint = _newest_checkpoint(run)
    lock = _holder(run)
    state = _state(lock, step, steps, checkpoint, age, usual_seconds)
    holder = None
    if lock is not None:
        holder = f"process {lock.get('pid')} on {lock.get('host')}, since {lock.get('since')}"
    known_mfu = [row["mfu"] for row in recent if row.get("mfu") is not None]
    if config["allocation"]["source"] == "learn":
        target_sparsity = last(rows, "target_sparsity")
    else:
        target_sparsity = _sparsity_of_table(run)
    remaining_seconds = None
    if usual_seconds is not None and state == "training":
        remaining_seconds = (steps - step) * usual_seconds
    return Status(
        run=str(run),
        state=state,
        holder=holder,
        step=step,
        steps=steps,
        tokens=int(rows[-1]["tokens"]) if rows else 0,
        loss=last(rows, "loss"),
        validation_loss=last(rows, "validation_loss"),
        tokens_per_second=fmean(row["tokens_per_second"] for row in recent) if recent else None,
        mfu=fmean(known_mfu) if known_mfu else None,
        expected_sparsity=last(rows, "expected_sparsity"),
        target_sparsity=target_sparsity,
        skipped=int(rows[-1].get("skipped", 0)) if rows else 0,
        seconds_since_step=age,
        remaining_seconds=remaining_seconds,
        checkpoint=checkpoint,
        stop_requested=(run / "stop").exists(),
        incidents=incidents.read(run)[-INCIDENTS:],
    )


def newest_rows(path: Path) -> list[Row]:
    """Returns the last rows of metrics.jsonl, in order, or no rows if there is no file.

    A line that is still being written is left out.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    if size > TAIL_BYTES:
        # Reading began in the middle of the first line.
        lines = lines[1:]
    rows = []
    for line in lines:
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _newest_checkpoint(run: Path) -> dict[str, Any] | None:
    """Returns step, bytes and date of the newest checkpoint, by its manifest.

    A folder named step_N is complete.
    """
    found = []
    for path in (run / run_folder.CHECKPOINTS).glob("step_*"):
        match = re.fullmatch(r"step_(\d+)", path.name)
        if match:
            found.append((int(match[1]), path))
    for step, path in sorted(found, reverse=True):
        try:
            manifest = parse_json((path / "manifest.json").read_text())
            size = sum(entry["bytes"] for entry in manifest["files"].values())
            return {"step": step, "bytes": size, "date": manifest["written"]["date"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # It was removed just now, or is damaged.
    return None


def _holder(run: Path) -> dict[str, Any] | None:
    """Returns the content of the run's lock, or None if no process holds it.

    A run empties the lock when it ends. A process of this machine that no longer exists does not
    hold it either.
    """
    try:
        holder = parse_json((run / run_folder.LOCK).read_text())
        is_here = holder["host"] == socket.gethostname()
        pid = int(holder["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if is_here and not _exists(pid):
        return None
    found: dict[str, Any] = holder
    return found


def _exists(pid: int) -> bool:
    """Whether a process of this machine exists."""
    try:
        # Signal 0 only tests.
        os.kill(pid, 0)
    except PermissionError:
        # It exists and belongs to another user.
        return True
    except (OSError, OverflowError):
        return False
    return True


def _state(
    holder: dict[str, Any] | None,
    step: int,
    steps: int,
    checkpoint: dict[str, Any] | None,
    age: float | None,
    usual: float | None,
) -> str:
    """Returns the state of a run, as Status describes it.

    age: seconds since the newest row was written.
    usual: median seconds of a step.
    """
    if holder is None:
        complete = checkpoint is not None and checkpoint["step"] == steps == step
        return "finished" if complete else "stopped"
    # Whether a process of another machine exists cannot be tested from here.
    elsewhere = holder["host"] != socket.gethostname()
    if not elsewhere or age is None or usual is None:
        return "training"
    quiet = age > QUIET_STEPS * usual + QUIET_SECONDS
    return "silent" if quiet else "training"


def _sparsity_of_table(run: Path) -> float | None:
    try:
        return float(parse_json((run / run_folder.ALLOCATION).read_text())["sparsity"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
