"""One job in a separate process.

The process is forked from a server that has already imported torch and DeepSpeed, because these
imports take seconds.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from megaconsa.console import guarded
from megaconsa.exit_codes import FAILED
from megaconsa.parallel.launcher import alone
from megaconsa.study.jobs import Job
from megaconsa.study.runs import Runs

STDOUT = 1
STDERR = 2
PRELOADED = [
    "megaconsa.study.work",
    "megaconsa.training.setup",
    "megaconsa.training.start_checks",
    "megaconsa.parallel.deepspeed.pipeline_modules",
]
"""Modules that take seconds to import."""
CPP_LOG = re.compile(r"\[rank\d+\]:\[[IWEF]\d")
"""Start of a line that torch's C++ code logs."""


@dataclass
class RunningJob:
    """A job and its process. Construction starts the process."""

    runs: Runs
    job: Job
    log: Path
    device: str | None
    """Value of CUDA_VISIBLE_DEVICES in the process. None on a CPU."""
    threads: int
    """Threads of torch for work on the CPU."""
    process: BaseProcess = field(init=False)
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        arguments = (self.runs, self.job, self.log, self.device, self.threads)
        self.process = _context().Process(target=_main, args=arguments, name=self.job.name)
        self.began = time.monotonic()
        self.process.start()

    @property
    def seconds(self) -> float:
        """Time since the process started."""
        return time.monotonic() - self.began

    def failure(self) -> str:
        """Returns why it failed: the signal that killed it, or the last line of its log.

        Empty lines are skipped, and so are lines of torch's C++ log. NCCL warns there about a
        process group that an error left open.
        """
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        lines = self.log.read_text(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip() and not CPP_LOG.match(line)]
        return said[-1] if said else f"exit code {code}"


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _main(runs: Runs, job: Job, log: Path, device: str | None, threads: int) -> None:
    """Runs the job. This is the entry point of the new process."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), STDOUT)
        os.dup2(file.fileno(), STDERR)
    faulthandler.enable()
    torch.set_num_threads(threads)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    # The job is a world of one process, even if torchrun or srun started the study.
    alone().export()
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    # Imported here because the study's own process does not need it.
    from megaconsa.study import work

    code: Any = FAILED
    try:
        guarded(lambda: sys.exit(work.run(runs, job)))
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # Skip the interpreter's clean-up, which has hung on GPUs. All results are on the disk.
    os._exit(code)


def _stop_with_parent() -> None:
    """Asks this process to stop once the study's own process is gone, for example because it was
    killed.

    Nobody would read the result.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
