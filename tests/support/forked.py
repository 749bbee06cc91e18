"""Processes that are forked from a server which has imported torch and DeepSpeed.

A fresh process spends seconds on these imports, which is longer than most tests train. Launchers
and Slurm jobs, whose tests are about fresh processes, do not use this.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

PRELOADED = [
    "megaconsa.training.setup",
    "megaconsa.training.start_checks",
    "megaconsa.parallel.deepspeed.pipeline_modules",
    "tests.support.topology_worker",
]


class Forked:
    """A process that runs a function. It has the methods of subprocess.Popen that tests use."""

    def __init__(
        self, function: Callable[..., None], *arguments: Any, environment: Mapping[str, str]
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.folder = tempfile.TemporaryDirectory(prefix="forked")
        self.out = Path(self.folder.name) / "out"
        self.err = Path(self.folder.name) / "err"
        self.process = context.Process(
            target=_main, args=(function, arguments, dict(environment), self.out, self.err)
        )
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        code = self.process.exitcode
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits, and returns everything that was written to stdout and to stderr."""
        self.wait(timeout)
        return self.out.read_text(), self.err.read_text()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills the process and the processes that it has started, such as the data's workers."""
        self.process.kill()
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)


def run_command(command: list[str]) -> None:
    """Does what `python COMMAND` does. The command is `-m MODULE ...` or `SCRIPT ...`."""
    if command[0] == "-m":
        sys.argv = command[1:]
        # runpy warns if the server has imported the module.
        sys.modules.pop(command[1], None)
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


def _main(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    out: Path,
    err: Path,
) -> None:
    """The entry point of the process."""
    os.setsid()
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    code: Any = 0
    try:
        function(*arguments)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
