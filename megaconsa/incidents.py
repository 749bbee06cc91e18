"""The incidents of a run: what went wrong or was unusual.

RUN/incidents.jsonl holds one JSON object per incident, with these fields:

    time    ISO 8601, with the time zone
    kind    a name in KINDS
    step    the current step, from 1, or null while starting
    rank
    text    a sentence for people
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any, Literal, get_args

from megaconsa import run_folder

logger = logging.getLogger(__name__)

Kind = Literal[
    "stop",
    "skipped",
    "rewind",
    "slow_rank",
    "slow_data",
    "checkpoint",
    "error",
    "lost_rank",
    "hang",
]
KINDS: tuple[Kind, ...] = get_args(Kind)


def record(run: Path, kind: Kind, text: str, *, step: int | None, rank: int) -> None:
    """Appends an incident to the file.

    If it cannot be written, for example because the disk is full, it is logged as an error instead:
    an incident must not end a run.

    step: the current step, from 1. None while starting.
    """
    path = run / run_folder.INCIDENTS
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "kind": kind,
        "step": step,
        "rank": rank,
        "text": text,
    }
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            # A single write keeps lines whole when ranks of one machine append to the same file.
            os.write(descriptor, json.dumps(entry).encode() + b"\n")
        finally:
            os.close(descriptor)
    except OSError as error:
        logger.error(
            "%s cannot be written: %s; it would have said: %s",
            path,
            error.strerror,
            text,
        )


def read(run: Path) -> list[dict[str, Any]]:
    """A run's incidents, in the order in which they were written.

    Torn and foreign lines are left out. A missing file gives an empty list.
    """
    path = run / run_folder.INCIDENTS
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.keys() >= {"time", "kind", "step", "rank", "text"}:
            found.append(entry)
    return found
