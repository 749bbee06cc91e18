"""Ranks that are forked, not started by a launcher. They run a check, or train jobs.

Jobs are described in topology_worker.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from megaconsa.parallel.launcher import Launch, free_port
from megaconsa.parallel.world import leave
from tests.support.forked import Forked
from tests.support.ranks import ended, environment

LAUNCH_SECONDS = 300
LINGER_SECONDS = 10.0
"""How long ranks may outlive one that failed. They often say why it did."""


def run_forked(size: int, check: Callable[..., None], *arguments: Any) -> None:
    """Calls `check` in `size` new ranks. A failure there is a failure here.

    The ranks have not joined a process group. They leave it at the end.
    """
    port = int(free_port())
    ranks = []
    for rank in range(size):
        place = Launch(rank, size, rank, "127.0.0.1", port)
        ranks.append(Forked(_check, place, check, arguments, environment=environment()))
    for rank, end in enumerate(ended(ranks)):
        assert end.code == 0, f"rank {rank}: {end.err}"


def _check(place: Launch, check: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    place.export()
    try:
        check(*arguments)
    finally:
        leave()


def launch(size: int, jobs: list[dict[str, Any]]) -> None:
    """Trains all jobs in `size` new ranks.

    Raises AssertionError with the last output of the ranks if a job fails.
    """
    port = int(free_port())
    ranks = []
    for index in range(size):
        place = Launch(index, size, index, "127.0.0.1", port)
        ranks.append(Forked(_train, place, jobs, environment=environment()))
    deadline = time.monotonic() + LAUNCH_SECONDS
    try:
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            if any(rank.poll() for rank in ranks):
                deadline = min(deadline, time.monotonic() + LINGER_SECONDS)
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()
    codes = [rank.wait() for rank in ranks]
    said = "\n".join(rank.err.read_text()[-4000:] for rank in ranks)
    assert codes == [0] * size, f"exit codes {codes}\n{said}"


def _train(place: Launch, jobs: list[dict[str, Any]]) -> None:
    from tests.support import topology_worker

    place.export()
    topology_worker.main(jobs)
