"""Which megaconsa this is: its version, and the commit if it runs from a checkout."""

from __future__ import annotations

import subprocess
from pathlib import Path

from megaconsa import __version__


def commit() -> str | None:
    """Returns the short commit of the checkout, with `+changes` where tracked files differ from it.

    None if the package is not in a checkout, or git is not installed.
    """
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    describe = ["git", "-C", str(root), "describe", "--always", "--exclude=*", "--dirty=+changes"]
    try:
        answer = subprocess.run(describe, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def described() -> str:
    """For example `0.1.0 (commit 1a2b3c4)`."""
    found = commit()
    return __version__ if found is None else f"{__version__} (commit {found})"
