"""Downloads the shards of the next window while the current one is read."""

from __future__ import annotations

import logging
import threading

import numpy as np

from megaconsa.data.order import Order
from megaconsa.data.token_mixture import Sequences
from megaconsa.errors import InputError, RunError, UnreachableError

logger = logging.getLogger(__name__)


class Prefetcher:
    """A thread that downloads ahead of a place in the stream. One process of a node needs it.

    It does not wait for a store that fails. The reader of a shard does, and reports failures.
    """

    def __init__(self, sequences: Sequences, order: Order, place: int, limit: int) -> None:
        """Starts at a place.

        order: of the sequences. No other thread may use it.
        limit: size of the cache in bytes. More is not downloaded ahead, because it would displace
            what is needed sooner.
        """
        self._sequences = sequences
        self._order = order
        self._place = place
        self._limit = limit
        self._moved = threading.Event()
        self._closed = False
        # A daemon, because a download may outlast the run.
        threading.Thread(target=self._work, name="prefetch", daemon=True).start()

    def move(self, place: int) -> None:
        """Says which place the stream has reached."""
        self._place = place
        self._moved.set()

    def close(self) -> None:
        """Ends the thread after its current download. Does not wait for it."""
        self._closed = True
        self._moved.set()

    def _work(self) -> None:
        done: set[int] = set()
        while not self._closed:
            self._moved.clear()
            wanted = np.concatenate(self._order.ahead(self._place)).tolist()
            done.intersection_update(wanted)
            self._fetch(wanted, done)
            self._moved.wait()

    def _fetch(self, wanted: list[int], done: set[int]) -> None:
        """Downloads the shards of some sequences, in this order, and adds the sequences to `done`.

        A shard that is damaged is left to its reader. One that its store did not send is tried
        again in the next step.
        """
        room = self._limit
        for index in wanted:
            room -= self._sequences.shard_bytes(index)
            if self._closed or room < 0:
                return
            if index in done:
                continue
            try:
                self._sequences.fetch_ahead(index)
            except (OSError, UnreachableError) as error:
                logger.debug("not downloaded ahead: %s", error)
                continue
            except (RunError, InputError) as error:
                logger.debug("not downloaded ahead, and not tried again: %s", error)
            done.add(index)
