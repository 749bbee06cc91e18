"""The limit of open files. Every connection to another rank counts as one."""

from __future__ import annotations

import logging
import resource

from megaconsa.parallel.launcher import Launch

logger = logging.getLogger(__name__)

OWN_FILES = 256
"""Files of a process by itself: libraries, data, logs, threads."""
FILES_A_RANK = 2
"""Files for each other rank: on rank 0 one connection to its store, and perhaps one more.

A gloo group has only a few connections (world.py)."""


def raise_limit(launch: Launch) -> None:
    """Raises this process's limit of open files (ulimit -n) to what the administrator allows.

    Rank 0 warns where that is too little for the launch.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = OWN_FILES + FILES_A_RANK * launch.size
    if hard != resource.RLIM_INFINITY and hard < needed and launch.rank == 0:
        logger.warning(
            "a process may open %d files (ulimit -Hn), but %d ranks need about %d each for their "
            "connections; ask the administrator for more, or start fewer processes",
            hard,
            launch.size,
            needed,
        )
