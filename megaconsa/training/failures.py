"""What a rank leaves when an error ends it: a file of its own in the run folder, and on the terminal the first rank's error alone."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from pathlib import Path

from megaconsa.errors import RunError
from megaconsa.exit_codes import FAILED
from megaconsa.files import replace_text
from megaconsa.parallel.world import World

FOLDER = "failures"
FIRST = "first.txt"


def end(error: Exception, run: Path, world: World, step: int | None) -> int:
    """Reports the error, and ends the process where there are others; a lone one gets its exit code."""
    _report(error, run, world, step)
    if world.size > 1:
        # At once: both leaving the group and the interpreter's own end can wait for, or abort over, ranks that are gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(FAILED)
    return FAILED


def _report(error: Exception, run: Path, world: World, step: int | None) -> None:
    """Writes RUN/failures/LAUNCH/rank_N.txt, linked as first.txt if it is the first of its launch.

    The first to fail prints its error whole. The others fail because it is gone, which their line says, and more would bury the cause.
    To be called before the rank leaves its group: until then no other can have failed for its sake.
    """
    meant_for_user = isinstance(error, RunError)
    cause = f"error: {error}" if meant_for_user else "".join(traceback.format_exception(error)).rstrip()
    summary = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    place = f"rank {world.rank} of {world.size} on {socket.gethostname()}, pid {os.getpid()}"
    where = f"{place}, {'while starting' if step is None else f'in step {step}'}"
    path = run / FOLDER / world.launch / f"rank_{world.rank}.txt"
    try:
        replace_text(path, f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}  {where}\n{cause}\n")
        leader = _claim(path)
    except OSError as failed:  # a full disk, perhaps the very error that is reported
        leader, where = None, f"{where}; {path} could not be written: {failed.strerror}"
    if leader is None:
        print(cause if world.size == 1 and meant_for_user else f"{where}:\n{cause}", file=sys.stderr)
    elif cause not in leader:
        print(f"{where} failed after another rank: {summary}; see {path.with_name(FIRST)}", file=sys.stderr)


def _claim(path: Path) -> str | None:
    """None if this rank is the first of its launch to fail; otherwise what the first one wrote."""
    first = path.with_name(FIRST)
    try:
        os.link(path, first)
    except FileExistsError:
        return first.read_text()
    return None
