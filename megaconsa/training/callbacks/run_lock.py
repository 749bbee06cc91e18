"""A lease, RUN/.lock, that lets only one process at a time train in a run folder.

File system locks are not used. When a node loses power, NFS, Lustre and GPFS may keep a dead
client's lock forever, and some mounts lock within one machine only. Instead, the holder touches its
file every BEAT_SECONDS. Another start watches that file for WATCH_SECONDS. It measures this time by
its own clock, so clocks need not agree:

    touched meanwhile      the holder lives, and the start is refused
    not touched            the holder is gone, and the start takes the lease over

It takes the lease over at once if the holder was an earlier start of the same Slurm job, or a
process on this machine that is gone.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megaconsa import incidents, run_folder
from megaconsa.checkpoint.writer import Writer
from megaconsa.errors import InputError
from megaconsa.exit_codes import FAILED
from megaconsa.reading import patiently, read_text
from megaconsa.training.trainer import Callback, Order, Trainer

logger = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
"""Time between two touches of the file."""
WATCH_SECONDS = 60.0
"""Time limit for a holder to touch its file. NFS may show a touch up to a minute late."""
LOOK_SECONDS = 0.5
"""Pause before each look at a holder's file."""
SLOW_LOOK_SECONDS = 1.0
"""A look that takes longer than this shows that the storage did not respond."""
SETTLE_SECONDS = 1.0
"""Time for a competing start, which takes the lease over at the same moment, to write its file."""


@dataclass(frozen=True)
class Holder:
    """The content of the file."""

    token: str
    """Unique to each start."""
    host: str
    pid: int
    since: str
    started: int = 0
    """Start time of the process, in kernel ticks. It is needed because process IDs are reused."""
    machine: str = ""
    """Identifies the running kernel and its PID namespace."""
    job: str = ""
    """Slurm's job ID, with the task ID for an array. Empty outside of Slurm."""
    start: int = 0
    """Number of times that Slurm has restarted the job."""

    @classmethod
    def of_this_process(cls) -> Holder:
        environment = os.environ
        job = environment.get("SLURM_JOB_ID", "")
        if "SLURM_ARRAY_JOB_ID" in environment:
            array = environment["SLURM_ARRAY_JOB_ID"]
            task = environment.get("SLURM_ARRAY_TASK_ID", "")
            job = f"{array}_{task}"
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            pid=os.getpid(),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            started=_started(os.getpid()) or 0,
            machine=_machine(),
            job=job,
            start=int(environment.get("SLURM_RESTART_COUNT") or 0),
        )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since},"


UNKNOWN = Holder(token="", host="an unknown host", pid=0, since="an unknown time")
"""Placeholder for the holder of a file that cannot be read or parsed."""


class RunLock(Callback):
    """Makes the run folder and holds its lease.

    It holds the lease from construction until the run ends or the object is deleted.
    """

    order = Order.LEASE
    main_rank_only = True

    def __init__(self, run: Path) -> None:
        """Raises InputError if another process holds the lease, or the folder cannot be written."""
        self.run = run
        self.path = run / run_folder.LOCK
        self.own = Holder.of_this_process()
        refuse_if_held(run, self.own)
        before = _read(self.path)
        try:
            self._take_with_room(before)
        except OSError as error:
            raise InputError(f"run.dir={run} cannot be written: {error.strerror}") from None
        if before is not None:
            logger.info(
                "the last run in %s, of %s, ended without a word; its lock is void", run, before
            )
        _held[self.own.token] = self
        self._released = threading.Event()
        self._guard = threading.Lock()
        arguments = (weakref.ref(self), self._released)
        threading.Thread(target=_renew, args=arguments, name="run_lock", daemon=True).start()

    def on_finish(self, trainer: Trainer) -> None:
        self.release()

    def release(self) -> None:
        self._released.set()
        _held.pop(self.own.token, None)
        # No retries, and errors are ignored: the way the run itself ended decides the exit code.
        with self._guard, suppress(OSError):
            if _parse(self.path.read_text()) == self.own:
                self.path.unlink()

    def _take_with_room(self, before: Holder | None) -> None:
        """Takes the lease. Frees disk space first if there is not enough."""
        try:
            patiently(lambda: self._take(before), self.path)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            # A killed process may have filled the disk with its last save. Every start removes that
            # save in any case.
            Writer(self.run, keep=1).clean()
            self._take(before)

    def _take(self, before: Holder | None) -> None:
        """Writes the file.

        Raises InputError if another start takes the lease at the same moment.
        """
        self.run.mkdir(parents=True, exist_ok=True)
        mine = self.path.with_name(f"{run_folder.LOCK}.{self.own.token}")
        try:
            self._write(mine)
            if before is None and self._linked(mine):
                return
            now = _read(self.path)
            # Another start may have taken the lease after `before` was read. If the file is ours,
            # an earlier attempt succeeded, but its answer was lost.
            if now not in (before, self.own):
                raise _in_use(self.run, now)
            mine.replace(self.path)
        except FileNotFoundError:
            # If the file is ours, the first attempt did succeed, but its answer was lost and a
            # second attempt followed.
            if _read(self.path) != self.own:
                raise
        finally:
            mine.unlink(missing_ok=True)
        time.sleep(SETTLE_SECONDS)
        now = _read(self.path)
        if now != self.own:
            raise _in_use(self.run, now)

    def _linked(self, mine: Path) -> bool:
        """Creates the lock file as a hard link to `mine`. Only one of several starts succeeds.

        Returns False if there is a lock file, or if the file system has no links.
        """
        try:
            os.link(mine, self.path)
        except OSError:
            return False
        return True

    def _write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self.own)) + "\n")

    def touch(self) -> None:
        """Renews the lease.

        Ends the process if the lease was taken over, because another process trains here.
        """
        with self._guard:
            if not self._released.is_set():
                self._touch()

    def _touch(self) -> None:
        try:
            now = _parse(self.path.read_text())
        except FileNotFoundError:
            now = None
        if now == self.own:
            os.utime(self.path)
        elif now == UNKNOWN:
            return  # An unreadable file is no sign of another start.
        elif now is None:
            # The file was removed, perhaps by hand.
            mine = self.path.with_name(f"{run_folder.LOCK}.{self.own.token}")
            self._write(mine)
            mine.replace(self.path)
        else:
            text = (
                f"run.dir={self.run} was taken over by {now} while this process was suspended; "
                "it ends"
            )
            logger.error("%s", text)
            incidents.record(self.run, "error", text, step=None, rank=0)
            os._exit(FAILED)


_held: weakref.WeakValueDictionary[str, RunLock] = weakref.WeakValueDictionary()
"""The leases of this process, by token."""


def _renew(reference: weakref.ref[RunLock], released: threading.Event) -> None:
    """Touches the file of a lease until the lease is released or its object is deleted."""
    warned = False
    while not released.wait(BEAT_SECONDS):
        lock = reference()
        if lock is None:
            return
        try:
            lock.touch()
        except OSError as error:
            # On storage that does not respond, nobody sees a touch, but nobody can write either.
            if not warned:
                logger.warning("%s cannot be touched: %s", lock.path, error)
            warned = True
        # A reference that is kept while waiting would keep the lease alive.
        del lock


def refuse_if_held(run: Path, own: Holder | None = None) -> None:
    """Raises InputError if another process trains in the folder.

    Writes nothing, so it can be called before anything else. It may watch the folder for
    WATCH_SECONDS.
    """
    path = run / run_folder.LOCK
    holder = _read(path)
    if holder is None or _is_gone(path, holder, own or Holder.of_this_process()):
        return
    raise _in_use(run, holder)


def _is_gone(path: Path, holder: Holder, own: Holder) -> bool:
    """Whether the holder no longer trains."""
    if holder.job and holder.job == own.job and holder.start < own.start:
        # The holder was an earlier start of this Slurm job.
        return True
    if not holder.machine or holder.machine != own.machine:
        # Process IDs of another machine say nothing here.
        return _is_silent(path, holder)
    if holder.pid == os.getpid():
        return holder.token not in _held
    started = _started(holder.pid)
    if started is not None:
        return started != holder.started
    return _is_number_free(holder.pid) or _is_silent(path, holder)


def _is_silent(path: Path, holder: Holder) -> bool:
    """Whether a holder's file remains untouched for WATCH_SECONDS."""
    seen = _touched(path)
    # A start checks twice: before it builds anything, and when it takes the lease. The second check
    # need not watch again.
    if holder.token in _silent and _silent[holder.token] == seen:
        return True
    logger.info(
        "%s says that %s trains in it; watching for up to %.0f s whether that lives",
        path.parent,
        holder,
        WATCH_SECONDS,
    )
    watched = 0.0
    while watched < WATCH_SECONDS:
        time.sleep(LOOK_SECONDS)
        began = time.monotonic()
        if _touched(path) != seen:
            # The holder has released the lease, or it is alive.
            return _read(path) is None
        # While the storage does not respond, the holder cannot touch its file either. Such time
        # does not count.
        quick = time.monotonic() - began < SLOW_LOOK_SECONDS
        watched = watched + LOOK_SECONDS if quick else 0.0
    _silent[holder.token] = seen
    return True


_silent: dict[str, int | None] = {}
"""When the files of silent holders were last touched, by token."""


def _touched(path: Path) -> int | None:
    """The file's modification time in nanoseconds, by any clock. None if the file is gone."""

    def look() -> int:
        # Opening the file asks the file server. A stat alone may be answered from this machine's
        # cache.
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns

    try:
        return patiently(look, path)
    except FileNotFoundError:
        return None


def _read(path: Path) -> Holder | None:
    """The holder that wrote the file. None if there is no file, or if it is empty."""
    try:
        return _parse(read_text(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return UNKNOWN


def _parse(text: str) -> Holder | None:
    """The holder that a file's text describes. None for an empty text.

    A text of another version may have other fields. A text that is not a holder's gives UNKNOWN, so
    that its file is watched.
    """
    if not text:
        return None
    try:
        content = json.loads(text)
        known = {
            field.name: content[field.name] for field in fields(Holder) if field.name in content
        }
        return Holder(**known)
    except (ValueError, TypeError):
        return UNKNOWN


def _started(pid: int) -> int | None:
    """Start time of a process, in kernel ticks.

    None if there is no such process, or if it is dead or hidden.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state = fields[0]
    return None if state in "ZX" else int(fields[19])


def _is_number_free(pid: int) -> bool:
    """Whether no live process has this ID.

    A dead process that is not yet reaped still occupies its ID, but counts as free.
    """
    try:
        os.kill(pid, 0)  # Sends no signal, only checks whether the process exists.
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _started(pid) is None


def _machine() -> str:
    """Identifies the running kernel and its PID namespace. Empty if they are unknown.

    Containers on one machine see different processes under the same IDs.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _in_use(run: Path, holder: Holder | None) -> InputError:
    return InputError(
        f"run.dir={run} is in use: {holder or 'another process'} trains in it; "
        "wait for it or choose another run.dir"
    )
