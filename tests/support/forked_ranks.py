"""Trains jobs in ranks that are forked from a server.

The server has imported torch and DeepSpeed. A fresh process would spend most of its time on that.
Launchers, which start fresh processes, have their own tests.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import traceback
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megaconsa.parallel.launcher import Launch, free_port

LAUNCH_SECONDS = 300
LINGER_SECONDS = 10.0
"""How long ranks may outlive one that failed. They often say why it did."""
PRELOADED = [
    "megaconsa.training.setup",
    "megaconsa.training.start_checks",
    "megaconsa.parallel.deepspeed.pipeline_modules",
    "tests.support.topology_worker",
]


def launch(size: int, jobs: list[dict[str, Any]], folder: Path) -> None:
    """Trains all jobs (see topology_worker.py) in `size` new ranks.

    Raises AssertionError with the last output of the ranks if a job fails.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    log = folder / "ranks.log"
    log.write_text("")
    port = int(free_port())
    text = json.dumps(jobs)
    ranks = []
    for rank in range(size):
        place = Launch(rank, size, rank, "127.0.0.1", port)
        ranks.append(context.Process(target=_rank, args=(place, text, log), name=f"rank {rank}"))
    for process in ranks:
        process.start()
    deadline = time.monotonic() + LAUNCH_SECONDS
    try:
        while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
            if any(process.exitcode for process in ranks):
                deadline = min(deadline, time.monotonic() + LINGER_SECONDS)
            time.sleep(0.05)
    finally:
        for process in ranks:
            _kill_with_children(process)
    codes = [process.exitcode for process in ranks]
    assert codes == [0] * size, f"exit codes {codes}\n{log.read_text()[-4000:]}"


def _rank(place: Launch, text: str, log: Path) -> None:
    """The entry point of a rank's process."""
    # The loader of the data starts processes too. A session makes them easy to kill with the rank.
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    place.export()
    from tests.support import topology_worker

    code = 1
    try:
        topology_worker.main(json.loads(text))
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def _kill_with_children(process: BaseProcess) -> None:
    assert process.pid is not None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
