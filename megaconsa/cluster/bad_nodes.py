"""Suspicious nodes: those that the next start must avoid after a failure."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

from megaconsa import run_folder
from megaconsa.parallel.launcher import START_FORMAT

FIRST = "first.txt"
"""File that the first rank to fail wrote."""
DIED = "died without a word"
"""What other ranks report about a rank that left no error."""
LOST = re.compile(rf"^error: rank \d+ of \d+ on (\S+) {DIED}", re.MULTILINE)
FAILED = re.compile(r"rank \d+ of \d+ on (\S+), pid")
HARDWARE = re.compile(
    "uncorrectable (ECC|NVLink) error|hardware stack error|GPU is lost|busy or unavailable"
    "|system not yet initialized"
)
"""CUDA's messages for errors that no program causes."""


def suspects(run: Path, since: datetime | None) -> list[str]:
    """The nodes to avoid, judging by the newest start of a run.

    A node is suspicious if one of its ranks died without an error, or if its GPU broke. Other
    errors give no node, because they would occur on every node.

    since: time of the previous failure. A start that began before it has been judged already. Then
        the newest start left no file, and no node is suspicious.
    """
    starts = sorted((run / run_folder.FAILURES).glob(f"*/{FIRST}"))
    if not starts:
        return []
    try:
        began = datetime.strptime(starts[-1].parent.name, START_FORMAT)
        said = starts[-1].read_text()
    except (OSError, ValueError):
        return []
    if since is not None and began < since:
        return []
    found = LOST.search(said)
    if found is None and HARDWARE.search(said):
        found = FAILED.search(said)
    return [found[1]] if found else []
