"""What went wrong, or was out of the ordinary, in a run: RUN/incidents.jsonl, one JSON object an incident.

Fields: time (ISO 8601, with the zone), kind (a name in KINDS), step (that was being done, from 1, or null while starting), rank, text (a
sentence for people).
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

Kind = Literal["stop", "skipped", "rewind", "slow_rank", "checkpoint", "error", "lost_rank", "hang"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def record(run: Path, kind: Kind, text: str, *, step: int | None, rank: int) -> None:
    """Appends an incident. One that cannot be written, on a full disk say, is an error in the log: it must end no run."""
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "kind": kind,
        "step": step,
        "rank": rank,
        "text": text,
    }
    try:
        # In one write: ranks of one machine append to the same file.
        descriptor = os.open(
            run / run_folder.INCIDENTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666
        )
        try:
            os.write(descriptor, json.dumps(entry).encode() + b"\n")
        finally:
            os.close(descriptor)
    except OSError as error:
        logger.error(
            "%s cannot be written: %s; it would have said: %s",
            run / run_folder.INCIDENTS,
            error.strerror,
            text,
        )


def read(run: Path) -> list[dict[str, Any]]:
    """A run's incidents in the order of their writing; lines that are torn or foreign are left out, and a missing file is none."""
    try:
        lines = (
            (run / run_folder.INCIDENTS).read_text(encoding="utf-8", errors="replace").splitlines()
        )
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
