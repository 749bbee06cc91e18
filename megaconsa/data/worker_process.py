"""What the processes that read data have in common."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""Option of Linux's prctl(2). It sets the signal that a process gets when its parent dies."""


def die_with_parent(parent: int) -> None:
    """Makes the system kill this process when its parent dies.

    A process that is blocked on a full pipe would not notice that itself.

    parent: the process ID of the parent.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before that call. In a container it may itself be process 1.
    if os.getppid() != parent:
        os._exit(1)
