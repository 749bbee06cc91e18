"""How far sentencepiece has come while it trains: it says so in its log only, on stderr."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STDERR = 2
_OWN = re.compile(rb"\w+\.cc[:(]\d+|^\w+ \{\}?$|^  \w+: |^\}$|^WARNING: All log messages before")
"""A line of sentencepiece's own: it names a place in its sources, or belongs to the list of its
options, or comes from its log library."""
_MERGES = re.compile(rb"\b(?:merges|size)=(\d+)")
"""The number of merges so far. Releases before 0.2.1 call it size."""


@contextmanager
def merges_reported(advance: Callable[[int], None]) -> Iterator[None]:
    """Reads this process's stderr in a thread, and calls `advance` with the number of new merges.

    The body must let other threads run, as sentencepiece does while it merges. Lines that are not
    sentencepiece's are passed on to stderr.
    """
    sys.stderr.flush()
    stderr = os.dup(STDERR)
    readable, writable = os.pipe()
    os.dup2(writable, STDERR)
    os.close(writable)
    reader = threading.Thread(target=_read, args=(readable, stderr, advance), daemon=True)
    reader.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        # This closes the last writable end of the pipe, which ends the thread.
        os.dup2(stderr, STDERR)
        reader.join()
        os.close(stderr)


def _read(readable: int, stderr: int, advance: Callable[[int], None]) -> None:
    merges = 0
    with open(readable, "rb") as log:
        for line in log:
            if not _OWN.search(line):
                os.write(stderr, line)
            elif found := _MERGES.search(line):
                advance(int(found[1]) - merges)
                merges = int(found[1])
