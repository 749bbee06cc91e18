"""How a run stands, from its folder alone: nothing is written or locked, and no torch loaded, so that it can be asked at any time."""

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
"""Of metrics.jsonl that are read: some thousand rows."""
RECENT = 50
"""Newest rows that speeds are a mean of."""
QUIET_STEPS, QUIET_SECONDS = 10, 60
"""A run on another machine counts as training while its newest row is not older than so many steps and seconds together."""
INCIDENTS = 5
"""Newest ones that are shown."""


@dataclass(frozen=True)
class Status:
    """None stands for what the run has not got to yet, or does not have."""

    run: str
    state: str
    """training, finished, stopped (the same command goes on) or silent: its lock says that it trains, its files that it does not."""
    holder: str | None
    """Who holds the run's lock."""
    step: int
    steps: int
    tokens: int
    loss: float | None
    validation_loss: float | None
    tokens_per_second: float | None
    mfu: float | None
    expected_sparsity: float | None
    """While learning."""
    target_sparsity: float | None
    """While learning that of the newest step; of a finished table its share of windowed heads."""
    skipped: int
    """Steps whose update was left out."""
    seconds_since_step: float | None
    """Since the newest row of metrics was written."""
    remaining_seconds: float | None
    """Steps to go at the median of the newest steps' seconds, without validation and checkpoints; None unless it trains."""
    checkpoint: dict[str, Any] | None
    """Of the newest: step, bytes, date."""
    stop_requested: bool
    """Whether a stop file waits to be obeyed."""
    incidents: list[dict[str, Any]]
    """The newest, oldest first."""


def status(run: Path) -> Status:
    """Reads a run folder; InputError where it is none."""
    try:
        config = yaml.safe_load((run / run_folder.CONFIG).read_text())
        steps = int(config["training"]["steps"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        raise InputError(f"{run} is not a run folder: it holds no config.yaml of a run") from None
    rows = newest_rows(run / run_folder.METRICS)
    recent = rows[-RECENT:]
    step = int(rows[-1]["step"]) if rows else 0
    usual = median(row["step_seconds"] for row in recent) if recent else None
    age = time.time() - (run / run_folder.METRICS).stat().st_mtime if rows else None
    checkpoint = _newest_checkpoint(run)
    holder = _holder(run)
    state = _state(holder, step, steps, checkpoint, age, usual)
    return Status(
        run=str(run),
        state=state,
        holder=None
        if holder is None
        else f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}",
        step=step,
        steps=steps,
        tokens=int(rows[-1]["tokens"]) if rows else 0,
        loss=last(rows, "loss"),
        validation_loss=last(rows, "validation_loss"),
        tokens_per_second=fmean(row["tokens_per_second"] for row in recent) if recent else None,
        mfu=fmean(known)
        if (known := [row["mfu"] for row in recent if row.get("mfu") is not None])
        else None,
        expected_sparsity=last(rows, "expected_sparsity"),
        target_sparsity=last(rows, "target_sparsity")
        if config["allocation"]["source"] == "learn"
        else _sparsity_of_table(run),
        skipped=int(rows[-1].get("skipped", 0)) if rows else 0,
        seconds_since_step=age,
        remaining_seconds=(steps - step) * usual
        if usual is not None and state == "training"
        else None,
        checkpoint=checkpoint,
        stop_requested=(run / "stop").exists(),
        incidents=incidents.read(run)[-INCIDENTS:],
    )


def newest_rows(path: Path) -> list[Row]:
    """The last rows of metrics.jsonl, in order; none where there is no file. A line that is being written is left out."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return []
    rows = []
    for line in lines if size <= TAIL_BYTES else lines[1:]:
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _newest_checkpoint(run: Path) -> dict[str, Any] | None:
    """By its manifest; a folder named step_N is whole."""
    found = [
        (int(match[1]), path)
        for path in (run / run_folder.CHECKPOINTS).glob("step_*")
        if (match := re.fullmatch(r"step_(\d+)", path.name))
    ]
    for step, path in sorted(found, reverse=True):
        try:
            manifest = parse_json((path / "manifest.json").read_text())
            size = sum(entry["bytes"] for entry in manifest["files"].values())
            return {"step": step, "bytes": size, "date": manifest["written"]["date"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # removed just now, or damaged
    return None


def _holder(run: Path) -> dict[str, Any] | None:
    """What the lock says, which a run that ends empties; None where nobody holds it, a process of this machine that is gone included."""
    try:
        holder = parse_json((run / ".lock").read_text())
        if holder["host"] == socket.gethostname():
            os.kill(int(holder["pid"]), 0)  # asks only whether it is there
    except PermissionError:  # it is, and another user's
        return holder if isinstance(holder, dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return holder if isinstance(holder, dict) else None


def _state(
    holder: dict[str, Any] | None,
    step: int,
    steps: int,
    checkpoint: dict[str, Any] | None,
    age: float | None,
    usual: float | None,
) -> str:
    if holder is None:
        return (
            "finished"
            if checkpoint is not None and checkpoint["step"] == steps == step
            else "stopped"
        )
    elsewhere = holder["host"] != socket.gethostname()
    if (
        elsewhere
        and age is not None
        and usual is not None
        and age > QUIET_STEPS * usual + QUIET_SECONDS
    ):
        return "silent"
    return "training"


def _sparsity_of_table(run: Path) -> float | None:
    try:
        return float(parse_json((run / run_folder.ALLOCATION).read_text())["sparsity"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
