"""Ranks that only wait notice the end of one of them, through the ring that connects them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megaconsa.exit_codes import LOST
from megaconsa.parallel.launcher import Launch, free_port
from megaconsa.parallel.world import join
from megaconsa.training.callbacks.lost_ranks import LostRanks
from tests.support.forked import Forked
from tests.support.ranks import ended, environment

RANKS = 4


def wait_in_ring(place: Launch, run: Path) -> None:
    """Kills rank 2 once all ranks have nothing more to say to each other."""
    place.export()
    world = join()
    trainer: Any = SimpleNamespace(progress=SimpleNamespace(step=6), completed=False)
    LostRanks(run, world).on_start(trainer)
    world.exchange(None)
    time.sleep(1)
    if world.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def test_the_end_of_a_rank_travels_around_the_ring(tmp_path: Path) -> None:
    port = int(free_port())
    ranks = []
    for rank in range(RANKS):
        place = Launch(rank, RANKS, rank, "127.0.0.1", port)
        ranks.append(Forked(wait_in_ring, place, tmp_path, environment=environment()))
    codes = [end.code for end in ended(ranks, patience=40)]
    assert codes == [LOST, LOST, -signal.SIGKILL, LOST]
