"""The processes of jobs: as on a GPU, and processes that do not end."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megaconsa.study import process
from megaconsa.study.jobs import Job, start_job
from megaconsa.study.runs import Runs


def linger(runs: Runs, job: Job, log: Path, device: str | None, threads: int) -> None:
    """Replaces a job's entry function: writes the result and sleeps."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), process.STDERR)
    faulthandler.enable()
    job.result.mkdir(parents=True)
    time.sleep(600)


def leave_a_log(runs: Runs, job: Job, log: Path, device: str | None, threads: int) -> None:
    """Replaces a job's entry. Fails as a job on a GPU did that ran out of memory."""
    log.write_text(
        "torch.OutOfMemoryError: CUDA out of memory\n"
        "[rank0]:[W1127 19:17:32.522147596 ProcessGroupNCCL.cpp:1575] Warning: WARNING: "
        "destroy_process_group() was not called before program exit\n"
    )
    os._exit(1)


def test_a_process_that_does_not_end_is_aborted_with_its_stacks(
    make_runs: Callable[..., Runs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_main", linger)
    runs = make_runs()
    job = start_job(runs)
    log = tmp_path / "start.log"
    running = process.RunningJob(runs, job, log, device=None, threads=1)
    running.abort_if_stuck()
    assert running.process.is_alive()
    while not job.done:
        time.sleep(0.1)
    running.abort_if_stuck()
    running.abort_if_stuck()
    assert running.process.is_alive()
    monkeypatch.setattr(process, "LINGER_SECONDS", 0.0)
    running.abort_if_stuck()
    assert running.process.exitcode == -signal.SIGABRT
    assert "in linger" in log.read_text()


def test_the_reason_is_not_what_nccl_warns_of_afterwards(
    make_runs: Callable[..., Runs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_main", leave_a_log)
    log = tmp_path / "start.log"
    running = process.RunningJob(make_runs(), start_job(make_runs()), log, device=None, threads=1)
    running.process.join()
    assert running.failure() == "torch.OutOfMemoryError: CUDA out of memory"


def test_a_job_runs_on_a_device_of_its_own(make_runs: Callable[..., Runs], tmp_path: Path) -> None:
    """The job gets a device, as on a machine with GPUs.

    The name of this device hides all GPUs.
    """
    runs = make_runs()
    job = start_job(runs)
    running = process.RunningJob(runs, job, tmp_path / "start.log", device="", threads=1)
    running.process.join()
    assert running.process.exitcode == 0
    assert job.done
