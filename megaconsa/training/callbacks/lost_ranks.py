"""Ends a rank as soon as another rank is gone, with any launcher and backend."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from megaconsa.parallel.launcher import node
from megaconsa.parallel.world import World
from megaconsa.training import failures
from megaconsa.training.trainer import Callback, Order, Trainer

FOR_EVER = timedelta(days=365)


class LostRanks(Callback):
    """Connects the ranks in a ring on gloo.

    A thread of each rank waits for a message from the next rank, which sends it only at a
    successful end. The kernel closes the connections of a process that dies. So its neighbour
    learns of it at once and ends too, and the end travels around the ring.

    Nothing is sent during training. NCCL alone would wait for ten minutes, and a launcher may not
    end the other ranks.
    """

    order = Order.WATCH

    def __init__(self, run: Path, world: World) -> None:
        """Creates the ring. All ranks must do so at the same time."""
        self.run = run
        self.world = world
        self.next = (world.rank + 1) % world.size
        self.before = (world.rank - 1) % world.size
        self.host = world.exchange(node())[self.next]
        self.ring: Any = dist.new_group(backend="gloo", timeout=FOR_EVER)
        self._connect()
        self.thread = threading.Thread(target=self._wait, name="lost_ranks", daemon=True)
        self.trainer: Trainer | None = None

    def on_start(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.thread.start()

    def on_finish(self, trainer: Trainer) -> None:
        # A rank that ends with an error sends nothing, so the other ranks see it as lost.
        if trainer.completed:
            dist.send(torch.ones(1), self.before, group=self.ring)
            self.thread.join()

    def _connect(self) -> None:
        """Sends one message around the ring.

        gloo connects two ranks when they first exchange something. Without a connection, nothing
        would tell a rank that its neighbour has died.
        """
        sent = dist.isend(torch.ones(1), self.before, group=self.ring)
        dist.recv(torch.zeros(1), self.next, group=self.ring)
        assert sent is not None
        sent.wait()

    def _wait(self) -> None:
        try:
            dist.recv(torch.zeros(1), self.next, group=self.ring)
        except RuntimeError:
            assert self.trainer is not None
            gone = f"rank {self.next} of {self.world.size} on {self.host}"
            failures.end_after(gone, self.run, self.world, self.trainer.progress.step + 1)
