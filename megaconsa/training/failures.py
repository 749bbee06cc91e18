"""What a failing rank leaves: its own file in the run folder, and an error on the terminal.

Only the first rank that fails prints its whole error.
"""

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
"""How long a rank with a broken connection waits before it reports that.

The ring neighbour of a dead rank knows the cause. It gets this time to report first."""


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
    """Reports an error, and ends the process if there are other ranks.

    step: the step during which the error occurred, from 1. None while starting.
    code: exit code, unless an earlier rank has failed. Then its exit code is used.
    always: ends the process even if it is the only rank, because it must not continue.
    Returns the exit code if the process does not end here.
    """
    if world.size > 1 and _is_broken_connection(error):
        # If a dead rank broke the connection, the thread of LostRanks ends this process meanwhile.
        time.sleep(NEIGHBOUR_SECONDS)
    first = _report(error, run, world, step, code, kind)
    if world.size > 1 or always:
        # Exit at once. Leaving the process group and the interpreter's own exit can both wait for
        # ranks that are gone, or abort because of them.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if first is None else _code(first))
    return code


def end_after(gone: str, run: Path, world: World, step: int) -> None:
    """Ends the process because the rank `gone`, which this rank was waiting for, has ended.

    The exit code is that of the first failure. It is LOST if no rank has reported one.
    """
    first_failure = run / run_folder.FAILURES / world.launch / FIRST
    if first_failure.exists():
        fate = "has ended"
    else:
        fate = (
            f"{DIED}: killed from outside (kill -9, the kernel for want of memory), "
            "or its node is down"
        )
    lost = RunError(f"{gone} {fate}")
    end(lost, run, world, step, code=LOST, kind="lost_rank", always=True)


def _is_broken_connection(error: Exception) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and re.search("gloo|NCCL", str(error)) is not None


def _report(
    error: Exception, run: Path, world: World, step: int | None, code: int, kind: incidents.Kind
) -> str | None:
    """Writes RUN/failures/LAUNCH/rank_N.txt, and prints the error.

    The first rank of a launch to fail links its file as first.txt and prints its whole error. The
    others fail because that rank is gone. They print one line that says so: more would bury the
    cause.
    A rank must call this before it leaves its process group. Until then, no other rank can have
    failed because of it.
    Returns the content of first.txt if another rank wrote it. Returns None otherwise.
    """
    meant_for_user = isinstance(error, RunError)
    if meant_for_user:
        cause = f"error: {error}"
    else:
        cause = "".join(traceback.format_exception(error)).rstrip()
    summary = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    place = f"rank {world.rank} of {world.size} on {node()}, pid {os.getpid()}"
    where = f"{place}, {'while starting' if step is None else f'in step {step}'}"
    path = run / run_folder.FAILURES / world.launch / f"rank_{world.rank}.txt"
    first = None
    try:
        now = time.strftime("%Y-%m-%d %H:%M:%S %z")
        replace_text(path, f"{now}  {where}, exit code {code}\n{cause}\n")
        first = _claim(path)
    except OSError as failed:
        # The disk is full, perhaps. That may even be the error that is being reported.
        where += f"; {path} could not be written: {failed.strerror}"
    if first is None:
        is_plain = world.size == 1 and meant_for_user
        print(cause if is_plain else f"{where}:\n{cause}", file=sys.stderr)
        text = str(error) if meant_for_user else summary
        incidents.record(run, kind, text, step=step, rank=world.rank)
    elif cause not in first:
        print(
            f"{where} failed after another rank: {summary}; see {path.with_name(FIRST)}",
            file=sys.stderr,
        )
    return first


def _code(first: str) -> int:
    """The exit code in the first failure's file.

    All ranks exit with it, because a scheduler sees the exit code of any one of them.
    """
    match = re.search(r", exit code (\d+)$", first.partition("\n")[0])
    return int(match[1]) if match else FAILED


def _claim(path: Path) -> str | None:
    """Links this rank's file as first.txt, if no other rank of the launch has done so.

    Returns None if it succeeds. Returns the content of first.txt otherwise.
    """
    first = path.with_name(FIRST)
    try:
        # Creating a link is atomic: exactly one rank succeeds.
        os.link(path, first)
    except FileExistsError:
        return first.read_text()
    return None
