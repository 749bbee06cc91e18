"""The lease of a run folder.

Another run is refused while the holder lives. A dead holder never keeps a run from resuming.
Another machine is simulated by a process with its own host name and process numbers (unshare).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megaconsa import incidents, run_folder
from megaconsa.errors import InputError
from megaconsa.exit_codes import FAILED
from megaconsa.training.callbacks import run_lock
from megaconsa.training.callbacks.run_lock import Holder, RunLock
from tests.support import ROOT
from tests.support.disks import OUT_OF_REACH, fill
from tests.support.forked import Forked

ELSEWHERE = (
    "unshare",
    "--user",
    "--map-root-user",
    "--pid",
    "--uts",
    "--fork",
    "--kill-child",
    "--mount-proc",
)
WATCH_SECONDS = 3.0
AT_ONCE_SECONDS = 2.0

Holding = subprocess.Popen[str] | Forked
Hold = Callable[..., Holding]
PATIENCE_SECONDS = 60.0


def take_lease(run: Path, start: Path, ready: Path, held: Path) -> None:
    """Takes the lease of a run once the file `start` exists, and keeps it."""
    run_lock.BEAT_SECONDS = 0.2
    ready.touch()
    while not start.exists():
        time.sleep(0.01)
    lock = RunLock(run)
    held.touch()
    time.sleep(600)
    lock.release()


TAKE_LEASE = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tests.training.test_run_lock import take_lease
take_lease(*map(Path, sys.argv[1:]))
"""


def await_file(path: Path, process: Holding) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def _short_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "WATCH_SECONDS", WATCH_SECONDS)
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Hold]:
    """Starts a process that takes the lease of a run, here or on another machine."""
    processes: list[Holding] = []
    start = tmp_path / "start"

    def begin(
        run: Path, prefix: tuple[str, ...] = (), *, wait: bool = True, **environment: str
    ) -> Holding:
        number = len(processes)
        ready = tmp_path / f"ready_{number}"
        held = tmp_path / f"held_{number}"
        paths = (run, start, ready, held)
        process: Holding
        if prefix:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-c", TAKE_LEASE, *map(str, paths)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | environment,
            )
        else:
            process = Forked(take_lease, *paths, environment=os.environ | environment)
        processes.append(process)
        await_file(ready, process)
        if wait:
            start.touch()
            await_file(held, process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def elsewhere() -> tuple[str, ...]:
    """The prefix that makes a command run on another machine."""
    if (
        shutil.which("unshare") is None
        or subprocess.run([*ELSEWHERE, "true"], check=False).returncode
    ):
        pytest.skip("name spaces cannot be made here")
    return ELSEWHERE


class Clock:
    """The module time, which also adds up how long it was asked to sleep.

    A loaded machine makes a start slower, but does not change this sum.
    """

    def __init__(self) -> None:
        self.slept = 0.0

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        time.sleep(seconds)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def seconds_to_take(run: Path) -> float:
    """Takes and releases the lease of a run, and returns how long the start waited."""
    clock = Clock()
    with patch.object(run_lock, "time", clock):
        RunLock(run).release()
    return clock.slept


def leave_behind(run: Path, **changes: object) -> Holder:
    """Writes the file of a holder that no longer exists."""
    holder = replace(Holder.of_this_process(), **changes)  # type: ignore[arg-type]
    (run / run_folder.LOCK).write_text(json.dumps(asdict(holder)))
    return holder


def test_a_process_of_this_machine(hold: Hold, tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder = hold(run)
    with pytest.raises(
        InputError,
        match=rf"run.dir={run} is in use: process {holder.pid} on \S+, since .*, trains in it",
    ):
        RunLock(run)
    holder.kill()  # nobody has reaped the process yet
    time.sleep(0.5)
    assert seconds_to_take(run) < AT_ONCE_SECONDS
    assert list(run.iterdir()) == []


def test_a_process_of_another_machine(
    hold: Hold, elsewhere: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    holder = hold(run, elsewhere)
    with pytest.raises(InputError, match=r"is in use: process \d+ on"):
        RunLock(run)
    holder.kill()
    holder.wait()
    time.sleep(0.5)
    assert WATCH_SECONDS <= seconds_to_take(run) < WATCH_SECONDS + AT_ONCE_SECONDS


def test_a_later_start_of_the_same_job_takes_over_and_the_earlier_one_ends(
    hold: Hold, elsewhere: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    holder = hold(run, elsewhere, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(InputError, match="is in use"):
        RunLock(run)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    clock = Clock()
    with patch.object(run_lock, "time", clock):
        lock = RunLock(run)
    assert clock.slept < AT_ONCE_SECONDS
    assert holder.wait(30) == FAILED
    assert "was taken over by process" in incidents.read(run)[-1]["text"]
    assert json.loads((run / run_folder.LOCK).read_text())["token"] == lock.own.token
    lock.release()


def test_another_job_is_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_behind(tmp_path, machine="another", job="7", start=0)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert seconds_to_take(tmp_path) >= WATCH_SECONDS


def test_a_number_that_another_process_has_now(tmp_path: Path) -> None:
    leave_behind(tmp_path, pid=os.getppid(), started=1)
    assert seconds_to_take(tmp_path) < AT_ONCE_SECONDS


def test_a_lock_of_the_file_system_does_not_matter(tmp_path: Path) -> None:
    """A file server may hold such a lock for a dead client."""
    leave_behind(tmp_path, machine="another")
    with (tmp_path / run_folder.LOCK).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        seconds_to_take(tmp_path)


@pytest.mark.parametrize("apart", [-3600, 3600])
def test_clocks_that_differ(apart: int, tmp_path: Path) -> None:
    leave_behind(tmp_path, machine="another")
    stop = threading.Event()

    def touch() -> None:
        while not stop.wait(0.2):
            now = time.time() + apart
            os.utime(tmp_path / run_folder.LOCK, (now, now))

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(InputError, match="is in use"):
            RunLock(tmp_path)
    finally:
        stop.set()
        thread.join()


def test_a_holder_that_lets_go_while_it_is_watched(tmp_path: Path) -> None:
    leave_behind(tmp_path, machine="another")
    threading.Timer(0.7, (tmp_path / run_folder.LOCK).unlink).start()
    assert seconds_to_take(tmp_path) < WATCH_SECONDS


@pytest.mark.parametrize("left", [None, "stale"])
def test_of_several_starts_at_once_one_goes_on(
    left: str | None, hold: Hold, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    if left is not None:
        leave_behind(run, pid=os.getppid(), started=1)
    processes = [hold(run, wait=False) for _ in range(3)]
    (tmp_path / "start").touch()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while sum(process.poll() is None for process in processes) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (holder,) = (process for process in processes if process.poll() is None)
    await_file(tmp_path / f"held_{processes.index(holder)}", holder)
    assert len(list(tmp_path.glob("held_*"))) == 1


@pytest.mark.parametrize("left", [None, "stale"])
def test_a_start_that_looked_before_another_took_the_lease(
    left: str | None, hold: Hold, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    before = None
    if left is not None:
        before = leave_behind(run, pid=os.getppid(), started=1)
    late = RunLock.__new__(RunLock)
    late.run = run
    late.path = run / run_folder.LOCK
    late.own = Holder.of_this_process()
    holder = hold(run)
    with pytest.raises(InputError, match=rf"is in use: process {holder.pid} on"):
        late._take(before)
    time.sleep(1.0)
    assert holder.poll() is None


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"host": "node7", "pid": 12, "since": "2026-11-24 10:00:00"}']
)
def test_text_that_is_no_lease_is_watched(text: str, tmp_path: Path) -> None:
    (tmp_path / run_folder.LOCK).write_text(text)
    assert seconds_to_take(tmp_path) >= WATCH_SECONDS


def test_an_empty_file_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / run_folder.LOCK).touch()
    assert seconds_to_take(tmp_path) < AT_ONCE_SECONDS


def test_a_field_of_a_later_version_hides_no_living_holder(hold: Hold, tmp_path: Path) -> None:
    run = tmp_path / "run"
    hold(run)
    lock = run / run_folder.LOCK
    lock.write_text(json.dumps(json.loads(lock.read_text()) | {"later": 1}))
    with pytest.raises(InputError, match="is in use"):
        RunLock(run)


def test_a_file_that_was_removed_is_written_again(hold: Hold, tmp_path: Path) -> None:
    run = tmp_path / "run"
    holder = hold(run)
    (run / run_folder.LOCK).unlink()
    time.sleep(1)
    with pytest.raises(InputError, match="is in use"):
        RunLock(run)
    assert holder.poll() is None


def test_a_holder_that_touches_again_after_it_was_watched(tmp_path: Path) -> None:
    leave_behind(tmp_path, machine="another")
    run_lock.refuse_if_held(tmp_path)
    os.utime(tmp_path / run_folder.LOCK)
    assert seconds_to_take(tmp_path) >= WATCH_SECONDS


def test_time_in_which_storage_does_not_answer_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The watcher gets an answer first. The holder touches its file a second later."""
    leave_behind(tmp_path, machine="another")
    real = run_lock._touched
    looks = []

    def touched(path: Path) -> int | None:
        looks.append(path)
        if len(looks) == 3:
            time.sleep(WATCH_SECONDS + 1)
            threading.Timer(1.0, os.utime, [path]).start()
        return real(path)

    monkeypatch.setattr(run_lock, "_touched", touched)
    with pytest.raises(InputError, match="is in use"):
        RunLock(tmp_path)


def test_a_lost_answer_is_no_other_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS may make the link and, when asked again, say that it exists."""
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        link(source, target)

    monkeypatch.setattr(os, "link", twice)
    RunLock(tmp_path / "run").release()


def test_an_end_that_cannot_remove_the_file_raises_nothing(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run")
    lock.path.unlink()
    lock.path.symlink_to(OUT_OF_REACH)
    lock.release()


@pytest.mark.parametrize("disk", ["1m"], indirect=True)
def test_a_disk_that_a_killed_save_filled(disk: Path) -> None:
    left = disk / "checkpoints" / ".step_6.tmp"
    left.mkdir(parents=True)
    fill(left)
    RunLock(disk).release()
    assert not left.exists()
