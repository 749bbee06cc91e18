"""The limit on open files. Connections to many ranks would exceed it."""

from __future__ import annotations

import resource
import subprocess
import sys

RAISE = """
import resource, sys
from megaconsa.parallel.open_files import raise_limit
from megaconsa.parallel.launcher import Launch
soft, hard, size, rank = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
raise_limit(Launch(rank, size, 0, "head", 7))
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def raised(soft: int, hard: int, size: int, rank: int = 0) -> tuple[str, str]:
    """Raises the limit in a separate process, because a lowered limit cannot be raised again.

    Returns the limits afterwards, and what was printed.
    """
    arguments = [str(number) for number in (soft, hard, size, rank)]
    command = [sys.executable, "-c", RAISE, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    return ended.stdout.strip(), ended.stderr.strip()


def test_raised_to_what_is_allowed() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard >= 1024, "too few for this test"
    assert raised(100, 1024, 8) == ("1024 1024", "")
    assert raised(1024, 1024, 8) == ("1024 1024", "")


def test_too_few_for_the_launch() -> None:
    limits, said = raised(100, 1024, 512)
    assert limits == "1024 1024"
    assert said == (
        "a process may open 1024 files (ulimit -Hn), but 512 ranks need about 1280 each for their "
        "connections; ask the administrator for more, or start fewer processes"
    )
    assert raised(100, 1024, 512, rank=1) == ("1024 1024", "")
