"""The processes of jobs, as on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megaconsa.study import process
from megaconsa.study.jobs import Job, start_job
from megaconsa.study.runs import Runs


def leave_a_log(runs: Runs, job: Job, log: Path, device: str | None, threads: int) -> None:
    """Replaces a job's entry. Fails as a job on a GPU did that ran out of memory."""
    log.write_text(
        "torch.OutOfMemoryError: CUDA out of memory\n"
        "[rank0]:[W1127 19:17:32.522147596 ProcessGroupNCCL.cpp:1575] Warning: WARNING: "
        "destroy_process_group() was not called before program exit\n"
    )
    os._exit(1)


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
