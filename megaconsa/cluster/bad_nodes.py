"""Which nodes a failed start leaves under suspicion, so that the next one is kept off them."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

from megaconsa import run_folder
from megaconsa.parallel.launcher import START_FORMAT

FIRST = "first.txt"
"""What the rank that failed first wrote."""
DIED = "died without a word"
"""What the other ranks say of one that left no error."""
LOST = re.compile(rf"^error: rank \d+ of \d+ on (\S+) {DIED}", re.MULTILINE)
FAILED = re.compile(r"rank \d+ of \d+ on (\S+), pid")
HARDWARE = re.compile(
    "uncorrectable (ECC|NVLink) error|hardware stack error|GPU is lost|busy or unavailable|system not yet initialized"
)
"""CUDA's words for what no program does wrong."""


def suspects(run: Path, since: datetime | None) -> list[str]:
    """The node of the rank that died without a word, or whose GPU broke, in the newest start of a
    run; none for other errors, which every node would meet.

    since: an earlier failure. A start before it was looked at then, and the newest left nothing.
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
