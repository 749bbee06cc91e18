"""What a rank leaves when it ends too early: a file of its own in the run folder, and on the terminal the first rank's error alone."""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from pathlib import Path

from torch import distributed as dist

from megaconsa import incidents, run_folder
from megaconsa.cluster.bad_nodes import DIED, FIRST
from megaconsa.errors import RunError
from megaconsa.exit_codes import FAILED, LOST
from megaconsa.files import replace_text
from megaconsa.parallel.launcher import node
from megaconsa.parallel.world import World

NEIGHBOUR_SECONDS = 3.0
"""For the rank beside one that is gone to say so, before those that met a broken connection report that."""


def end(
    error: Exception,
    run: Path,
    world: World,
    step: int | None,
    *,
    code: int = FAILED,
    kind: incidents.Kind = "error",
    always: bool = False,
) -> int:
    """Reports the error, and ends the process where there are others or it must not go on (`always`); a lone one gets its exit code."""
    if world.size > 1 and _is_broken_connection(error):
        # Meanwhile the thread of LostRanks ends this process, if that is what broke it.
        time.sleep(NEIGHBOUR_SECONDS)
    first = _report(error, run, world, step, code, kind)
    if world.size > 1 or always:
        # At once: both leaving the group and the interpreter's own end can wait for, or abort over, ranks that are gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if first is None else _code(first))
    return code


def end_after(gone: str, run: Path, world: World, step: int) -> None:
    """Ends the process because the rank `gone`, which it was waiting for, is no more: with the exit code of the cause."""
    without_a_word = (
        f"{DIED}: killed from outside (kill -9, the kernel for want of memory), or its node is down"
    )
    left_a_file = (run / run_folder.FAILURES / world.launch / FIRST).exists()
    lost = RunError(f"{gone} {'has ended' if left_a_file else without_a_word}")
    end(lost, run, world, step, code=LOST, kind="lost_rank", always=True)


def _is_broken_connection(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and re.search("gloo|NCCL", str(error)) is not None
    )


def _report(
    error: Exception, run: Path, world: World, step: int | None, code: int, kind: incidents.Kind
) -> str | None:
    """Writes RUN/failures/LAUNCH/rank_N.txt, linked as first.txt if it is the first of its launch; returns what an earlier one wrote.

    The first to fail prints its error whole. The others fail because it is gone, which their line says, and more would bury the cause.
    To be called before the rank leaves its group: until then no other can have failed for its sake.
    """
    meant_for_user = isinstance(error, RunError)
    cause = (
        f"error: {error}" if meant_for_user else "".join(traceback.format_exception(error)).rstrip()
    )
    summary = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    place = f"rank {world.rank} of {world.size} on {node()}, pid {os.getpid()}"
    where = f"{place}, {'while starting' if step is None else f'in step {step}'}"
    path = run / run_folder.FAILURES / world.launch / f"rank_{world.rank}.txt"
    first = None
    try:
        replace_text(
            path, f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}  {where}, exit code {code}\n{cause}\n"
        )
        first = _claim(path)
    except OSError as failed:  # a full disk, perhaps the very error that is reported
        where += f"; {path} could not be written: {failed.strerror}"
    if first is None:
        print(
            cause if world.size == 1 and meant_for_user else f"{where}:\n{cause}", file=sys.stderr
        )
        incidents.record(
            run, kind, str(error) if meant_for_user else summary, step=step, rank=world.rank
        )
    elif cause not in first:
        print(
            f"{where} failed after another rank: {summary}; see {path.with_name(FIRST)}",
            file=sys.stderr,
        )
    return first


def _code(first: str) -> int:
    """The exit code of the rank that wrote this: the others end with it too, for a scheduler sees any one of them."""
    match = re.search(r", exit code (\d+)$", first.partition("\n")[0])
    return int(match[1]) if match else FAILED


def _claim(path: Path) -> str | None:
    """None if this rank is the first of its launch to fail; otherwise what the first one wrote."""
    first = path.with_name(FIRST)
    try:
        os.link(path, first)
    except FileExistsError:
        return first.read_text()
    return None
