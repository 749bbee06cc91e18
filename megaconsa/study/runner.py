"""Runs jobs in parallel and reports progress. A job starts once the jobs that it needs are done."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

import torch

from megaconsa import run_folder
from megaconsa.console import console
from megaconsa.exit_codes import DONE, FAILED, STOPPED
from megaconsa.reporting.metrics import last, read_metrics
from megaconsa.study.jobs import Job
from megaconsa.study.measures import Measures
from megaconsa.study.process import RunningJob
from megaconsa.study.runs import Runs

STOP_SECONDS = 120.0
"""Time that running jobs get to save and end before they are killed."""
INTERRUPTED = 130
"""Exit code after Ctrl-C."""


class Stopped(Exception):
    """A signal ended the study. The exception's argument is the exit code."""


def visible_devices() -> list[str]:
    """Returns the GPUs of this process as CUDA_VISIBLE_DEVICES names them. A CPU has none."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(number) for number in range(count)]
    return names[:count]


@dataclass
class Runner:
    """Runs the jobs of a graph that are not done yet."""

    runs: Runs
    jobs: Sequence[Job]
    """Jobs in order: each comes after those that it needs."""
    devices: Sequence[str]
    """GPUs. Empty on a CPU."""
    at_once: int
    """Number of jobs that run in parallel."""
    failed: dict[str, str] = field(default_factory=dict)
    """Reason of each failed job, by name."""
    _running: dict[int, RunningJob] = field(default_factory=dict)
    """Running jobs by slot."""
    _seconds: dict[str, list[float]] = field(default_factory=dict)
    """Durations of the jobs that ran, by kind."""

    def run(self) -> int:
        """Runs all jobs and returns an exit code.

        The code is 0 if all jobs are done, 1 if some failed, and 75 if some stopped and can be
        resumed. Raises Stopped after a signal, once the running jobs have ended.
        """
        waiting = [job for job in self.jobs if not job.done]
        if waiting:
            console.print(
                f"{len(waiting)} of {len(self.jobs)} jobs to run, {self.at_once} at once",
                markup=False,
            )
        stopped = False
        with _signals_raise():
            try:
                while True:
                    self._launch(waiting)
                    if not self._running:
                        break
                    stopped = self._collect(len(waiting)) or stopped
                    if stopped:
                        # The time of the batch job is over, so no new job may start.
                        waiting.clear()
            finally:
                self._stop_all()
        if self.failed:
            return FAILED
        return STOPPED if stopped else DONE

    def _launch(self, waiting: list[Job]) -> None:
        """Starts waiting jobs while there are free slots."""
        for job in list(waiting):
            if len(self._running) == self.at_once:
                return
            if self._is_ready(job):
                waiting.remove(job)
                self._start(job)

    def _start(self, job: Job) -> None:
        slot = next(slot for slot in range(self.at_once) if slot not in self._running)
        device = self.devices[slot % len(self.devices)] if self.devices else None
        log = self.runs.out / "logs" / f"{job.name}.log"
        self._running[slot] = RunningJob(self.runs, job, log, device, self._threads())

    def _threads(self) -> int:
        """Returns the number of torch threads for each job.

        The jobs share the cores. More threads than cores would wait for each other.

        On a GPU it is 1, as with torchrun. The CPU works on small tensors, and threads that wait
        for work take cores from the threads that launch kernels.
        """
        if self.devices:
            return 1
        share = (os.cpu_count() or 1) // self.at_once
        return min(torch.get_num_threads(), max(1, share))

    def _is_ready(self, job: Job) -> bool:
        needed = [other for other in self.jobs if other.name in job.needs]
        return all(other.done for other in needed)

    def _collect(self, waiting: int) -> bool:
        """Waits for the next jobs to end.

        waiting: number of jobs that have not started.

        Returns whether one of the jobs stopped before its end.
        """
        wait([running.process.sentinel for running in self._running.values()])
        stopped = False
        for slot, running in list(self._running.items()):
            if running.process.is_alive():
                continue
            running.process.join()
            del self._running[slot]
            self._seconds.setdefault(running.job.kind, []).append(running.seconds)
            if running.job.done:
                self._report(running, waiting)
            elif running.process.exitcode == STOPPED:
                stopped = True
            else:
                self._report_failure(running)
        return stopped

    def _report(self, running: RunningJob, waiting: int) -> None:
        done = sum(job.done for job in self.jobs)
        left = ""
        if waiting or self._running:
            left = f", about {_duration(self._seconds_left())} left"
        said = figure(self.runs, running.job)
        place = f"{done}/{len(self.jobs)} {running.job.name}"
        console.print(f"{place}: {said} ({running.seconds:.0f} s){left}", markup=False)

    def _report_failure(self, running: RunningJob) -> None:
        reason = running.failure()
        self.failed[running.job.name] = reason
        console.print(f"{running.job.name} failed, see {running.log}: {reason}", markup=False)

    def _seconds_left(self) -> float:
        """Estimates the remaining time from the mean duration of finished jobs of the same kind.

        If there are none of that kind, it uses all finished jobs.
        """
        every = [seconds for some in self._seconds.values() for seconds in some]
        total = 0.0
        for job in self.jobs:
            if not job.done and job.name not in self.failed:
                known = self._seconds.get(job.kind, every)
                total += sum(known) / len(known)
        return total / self.at_once

    def _stop_all(self) -> None:
        """Asks the running jobs to save and end, and kills those that take too long."""
        processes = [running.process for running in self._running.values()]
        if not processes:
            return
        console.print(
            f"stopping {len(processes)} jobs; the same command resumes the study",
            markup=False,
        )
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(STOP_SECONDS)
            process.kill()
            process.join()


def figure(runs: Runs, job: Job) -> str:
    """Returns the result of a finished job, in one line."""
    if job.kind == "score":
        return "units scored"
    if job.kind == "start":
        loss = last(read_metrics(runs.start / run_folder.METRICS), "validation_loss")
        return f"validation loss {loss:.4f}"
    assert job.trial is not None
    if job.kind == "first":
        rows = read_metrics(runs.first_folder(job.trial) / run_folder.METRICS)
        return f"validation loss {last(rows, 'validation_loss'):.4f} after the first leg"
    if job.kind == "learn":
        rows = read_metrics(runs.learn_folder(job.trial) / run_folder.METRICS)
        return f"validation loss {last(rows, 'validation_loss'):.4f} with the table learned"
    return f"validation loss {Measures.load(job.result).losses.mean:.4f}"


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Makes SIGINT and SIGTERM raise Stopped inside the context."""

    def stop(number: int, frame: Any) -> None:
        raise Stopped(INTERRUPTED if number == signal.SIGINT else STOPPED)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min"
