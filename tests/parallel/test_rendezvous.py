"""Ranks that wait for each other: what they print while one is missing, and how they end."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time

import pytest

from megaconsa.parallel.launcher import VARIABLES, free_port

MEET = """
import os, sys
from megaconsa.console import guarded
from megaconsa.parallel import launcher, rendezvous
rendezvous.NOTICE_SECONDS, rendezvous.PATIENCE_SECONDS = map(float, sys.argv[1:])
guarded(lambda: rendezvous.meet(launcher.launch()))
"""


def start(rank: int, size: int, port: str, notice: float, patience: float) -> subprocess.Popen[str]:
    values = (str(rank), str(size), str(rank), "127.0.0.1", port)
    return subprocess.Popen(
        [sys.executable, "-c", MEET, str(notice), str(patience)],
        env=dict(zip(VARIABLES, values, strict=True)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said_by(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Returns the exit code and the lines of stderr.

    torch's own warnings and their C++ stacks are left out.
    """
    _, said = process.communicate(timeout=60)
    lines = [line for line in said.splitlines() if re.match("error: |waiting |rank ", line)]
    return process.returncode, lines


def test_missing_ranks_are_named_at_once_and_end_it() -> None:
    port = free_port()
    here = [start(rank, 5, port, 2, 6) for rank in (0, 2)]
    main, other = map(said_by, here)
    meeting = f"127.0.0.1:{port}"
    awaited = "ranks 1, 3, 4 of 5"
    assert main == (
        76,
        [
            f"waiting for {awaited} at {meeting}",
            f"error: {awaited} did not come to {meeting} within 6 s; "
            "look at why they did not start, or cannot reach it",
        ],
    )
    code, (*notices, error) = other
    assert code == 76
    # On a loaded machine rank 0 may start two seconds later.
    assert set(notices) <= {f"rank 2 of 5 waits for rank 0 at {meeting}"}
    assert error.startswith(f"error: rank 2 of 5 hears nothing more from rank 0 at {meeting} (")


def test_the_main_rank_is_missing() -> None:
    port = free_port()
    code, (notice, error) = said_by(start(1, 2, port, 1, 4))
    assert code == 76
    assert notice == f"rank 1 of 2 waits for rank 0 at 127.0.0.1:{port}"
    assert error.startswith(f"error: rank 1 of 2 cannot reach rank 0 at 127.0.0.1:{port} (")


def test_a_port_in_use() -> None:
    """Another program uses the port.

    Rank 0 ends at once. The other rank prints which rank it waits for.
    """
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        began = time.monotonic()
        main = start(0, 2, str(port), 2, 60)
        other = start(1, 2, str(port), 1, 5)
        code, (error,) = said_by(main)
        assert time.monotonic() - began < 30
        assert code == 76
        assert error.startswith(f"error: MASTER_PORT={port} of this machine, where the ranks are")
        code, (notice, error) = said_by(other)
        assert code == 76
        assert notice == f"rank 1 of 2 waits for rank 0 at 127.0.0.1:{port}"
        assert error.startswith("error: rank 1 of 2 ")


def test_a_lone_process_needs_no_port() -> None:
    """A port that was free when it was chosen may be taken when it is needed."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert said_by(start(0, 1, str(taken.getsockname()[1]), 1, 5)) == (0, [])


@pytest.mark.parametrize("late", [0, 1])
def test_a_late_rank_is_waited_for(late: int) -> None:
    port = free_port()
    first = start(1 - late, 2, port, 1, 60)
    time.sleep(8)
    second = start(late, 2, port, 30, 60)
    waits = "waiting for rank 1 of 2" if late else "rank 1 of 2 waits for rank 0"
    assert said_by(first) == (0, [f"{waits} at 127.0.0.1:{port}"])
    assert said_by(second) == (0, [])
