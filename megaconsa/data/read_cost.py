"""What it costs to read data: bytes, time, and the part of the time that is computing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class ReadCost:
    """The cost of some reading, summed over all processes that read."""

    bytes: int = 0
    """Bytes of the rows."""
    seconds: float = 0.0
    """Time in which a process was reading."""
    cpu_seconds: float = 0.0
    """The part of `seconds` in which it computed, for example hashes.

    In the rest it waited for the storage or for a free core."""

    def __add__(self, other: ReadCost) -> ReadCost:
        return ReadCost(
            self.bytes + other.bytes,
            self.seconds + other.seconds,
            self.cpu_seconds + other.cpu_seconds,
        )

    def __sub__(self, other: ReadCost) -> ReadCost:
        return ReadCost(
            self.bytes - other.bytes,
            self.seconds - other.seconds,
            self.cpu_seconds - other.cpu_seconds,
        )

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the time of the `with` block. Counts the calling thread's computing only."""
        began = time.perf_counter()
        cpu_began = time.thread_time()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began
            self.cpu_seconds += time.thread_time() - cpu_began
