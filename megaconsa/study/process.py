"""One job in a fresh process. Processes fork from a server that has imported torch and DeepSpeed,
but touched no GPU."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

import torch

from megaconsa.console import guarded
from megaconsa.parallel.world import free_port
from megaconsa.study.jobs import Job
from megaconsa.study.runs import Runs

STDOUT = 1
STDERR = 2
PRELOADED = [
    "megaconsa.study.work",
    "megaconsa.training.setup",
    "megaconsa.training.start_checks",
    "megaconsa.parallel.pipeline_module",
]
"""Imports that take seconds. None of them may initialise CUDA: it would not survive the fork."""


@dataclass
class RunningJob:
    """A job and its process, which begins with the construction."""

    runs: Runs
    job: Job
    log: Path
    device: str | None
    """What CUDA_VISIBLE_DEVICES is to be; None on a CPU."""
    threads: int
    """Of torch, for what is computed on the CPU."""
    process: ForkServerProcess = field(init=False)
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        arguments = (self.runs, self.job, self.log, self.device, self.threads)
        self.process = _context().Process(target=_main, args=arguments, name=self.job.name)
        self.began = time.monotonic()
        self.process.start()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def failure(self) -> str:
        """Why it failed: the signal that killed it, or the last non-empty line of its
        log."""
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        lines = self.log.read_text(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return said[-1] if said else f"exit code {code}"


def _context() -> ForkServerContext:
    # DeepSpeed asks for GPUs when it is imported. torch then answers by NVML, without a CUDA
    # context in the server.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _main(runs: Runs, job: Job, log: Path, device: str | None, threads: int) -> None:
    """Entry of the new process."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), STDOUT)
        os.dup2(file.fileno(), STDERR)
    torch.set_num_threads(threads)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    # A world of one, whatever torchrun or srun started the study with. Jobs run side by side, so
    # each needs its own port.
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    from megaconsa.study import work  # not by the study's own process, which needs none of it

    guarded(lambda: sys.exit(work.run(runs, job)))


def _stop_with_parent() -> None:
    """Asks this process to stop once the study's own is gone, killed say: nobody would read its
    result."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
