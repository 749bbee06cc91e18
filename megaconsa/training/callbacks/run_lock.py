"""One process at a time trains in a run folder: a lease, RUN/.lock, that its holder renews.

Locks of the file system are not used. When a node loses power, NFS, Lustre and GPFS may hold a dead
client's lock for ever, and some mounts lock within one machine only. Here the holder touches its
file every BEAT_SECONDS. Another start watches that file for WATCH_SECONDS. It measures them by its
own clock, so clocks need not agree:

    touched meanwhile      the holder lives, and the start is refused
    not touched            the holder is gone, and the start takes the lease over

It takes over at once if the holder was an earlier start of the same Slurm job, or a process of this
machine that is gone.
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
from megaconsa.training.callbacks.base import Callback
from megaconsa.training.trainer import Trainer

logger = logging.getLogger(__name__)

BEAT_SECONDS = 10.0
"""Between two touches of the file."""
WATCH_SECONDS = 60.0
"""For a holder to touch its file. NFS may show a touch up to a minute late."""
LOOK_SECONDS = 0.5
SLOW_LOOK_SECONDS = 1.0
"""A look that takes longer says that the storage had stopped answering."""
SETTLE_SECONDS = 1.0
"""For another start that takes the lease over in the same moment to have written."""


@dataclass(frozen=True)
class Holder:
    """The content of the file."""

    token: str
    """Another one for each start."""
    host: str
    pid: int
    since: str
    started: int = 0
    """When the process began, in the kernel's ticks: numbers of processes are used again."""
    machine: str = ""
    """The kernel that runs now, and the name space of its process numbers."""
    job: str = ""
    """Slurm's number of the job, of an array with the task's; empty outside of Slurm."""
    start: int = 0
    """How often Slurm has started the job again."""

    @classmethod
    def of_this_process(cls) -> Holder:
        environment = os.environ
        job = environment.get("SLURM_JOB_ID", "")
        if "SLURM_ARRAY_JOB_ID" in environment:
            job = (
                f"{environment['SLURM_ARRAY_JOB_ID']}_{environment.get('SLURM_ARRAY_TASK_ID', '')}"
            )
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
"""Of a file that cannot be read or understood."""


class RunLock(Callback):
    """Makes the folder, and holds its lease from construction to the end of the run or of the object."""

    def __init__(self, run: Path) -> None:
        """Raises InputError where another process holds the lease, or the folder cannot be written."""
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
        # Without patience, and whatever comes: the run's own end decides the exit code.
        with self._guard, suppress(OSError):
            if _parse(self.path.read_text()) == self.own:
                self.path.unlink()

    def _take_with_room(self, before: Holder | None) -> None:
        try:
            patiently(lambda: self._take(before), self.path)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            # A killed process may have filled the disk with its last save. Every start removes that.
            Writer(self.run, keep=1).clean()
            self._take(before)

    def _take(self, before: Holder | None) -> None:
        """Writes the file. Raises InputError where another start does so in the same moment."""
        self.run.mkdir(parents=True, exist_ok=True)
        mine = self.path.with_name(f"{run_folder.LOCK}.{self.own.token}")
        try:
            self._write(mine)
            if before is None and not self.path.exists() and self._linked(mine):
                return
            mine.replace(self.path)
        except FileNotFoundError:
            if (
                _read(self.path) != self.own
            ):  # otherwise the answer to the first of two tries was lost
                raise
        finally:
            mine.unlink(missing_ok=True)
        time.sleep(SETTLE_SECONDS)
        now = _read(self.path)
        if now != self.own:
            raise _in_use(self.run, now)

    def _linked(self, mine: Path) -> bool:
        """Gives the file its name in one step, in which only one of several starts succeeds; False
        where the file system has no links."""
        try:
            os.link(mine, self.path)
        except FileExistsError:
            now = _read(self.path)
            if now != self.own:  # otherwise the answer to the first of two tries was lost
                raise _in_use(self.run, now) from None
        except OSError:
            return False
        return True

    def _write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self.own)) + "\n")

    def touch(self) -> None:
        """Renews the lease. If it was taken over the process ends, for another one trains here."""
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
            return  # that tells of no other start
        elif now is None:
            # Somebody removed it, by hand perhaps.
            mine = self.path.with_name(f"{run_folder.LOCK}.{self.own.token}")
            self._write(mine)
            mine.replace(self.path)
        else:
            text = f"run.dir={self.run} was taken over by {now} while this process stood still; it ends"
            logger.error("%s", text)
            incidents.record(self.run, "error", text, step=None, rank=0)
            os._exit(FAILED)


_held: weakref.WeakValueDictionary[str, RunLock] = weakref.WeakValueDictionary()
"""The leases of this process, by token."""


def _renew(reference: weakref.ref[RunLock], released: threading.Event) -> None:
    """Touches the file of a lease until that is released or gone."""
    warned = False
    while not released.wait(BEAT_SECONDS):
        lock = reference()
        if lock is None:
            return
        try:
            lock.touch()
        except OSError as error:
            # Storage that does not answer shows nobody a touch, but nobody can write there either.
            if not warned:
                logger.warning("%s cannot be touched: %s", lock.path, error)
            warned = True
        del lock


def refuse_if_held(run: Path, own: Holder | None = None) -> None:
    """Raises InputError where another process trains in the folder; writes nothing, so that it can be
    asked before all else. It may watch the folder for WATCH_SECONDS."""
    path = run / run_folder.LOCK
    holder = _read(path)
    if holder is None or _is_gone(path, holder, own or Holder.of_this_process()):
        return
    raise _in_use(run, holder)


def _is_gone(path: Path, holder: Holder, own: Holder) -> bool:
    if holder.job and holder.job == own.job and holder.start < own.start:
        return True
    if not holder.machine or holder.machine != own.machine:
        return _is_silent(path, holder)
    if holder.pid == os.getpid():
        return holder.token not in _held
    started = _started(holder.pid)
    if started is not None:
        return started != holder.started
    return _is_number_free(holder.pid) or _is_silent(path, holder)


def _is_silent(path: Path, holder: Holder) -> bool:
    """Whether a holder's file is not touched for WATCH_SECONDS."""
    seen = _touched(path)
    # A start asks twice: before it builds anything, and when it takes the lease.
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
            return _read(path) is None  # released meanwhile, or alive
        # While storage answers nobody, the holder cannot touch either: such time does not count.
        quick = time.monotonic() - began < SLOW_LOOK_SECONDS
        watched = watched + LOOK_SECONDS if quick else 0.0
    _silent[holder.token] = seen
    return True


_silent: dict[str, int | None] = {}
"""When the files of silent holders were last touched, by token."""


def _touched(path: Path) -> int | None:
    """When the file was last touched, by whatever clock; None where it is gone."""

    def look() -> int:
        # Opening asks a file server; a mere stat may be answered from this machine's memory.
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns

    try:
        return patiently(look, path)
    except FileNotFoundError:
        return None


def _read(path: Path) -> Holder | None:
    """Who wrote the file; None where there is none, or it is empty."""
    try:
        return _parse(read_text(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return UNKNOWN


def _parse(text: str) -> Holder | None:
    """Text of another version has other fields, and text of nobody is a holder to be watched."""
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
    """When a process began, in the kernel's ticks; None where there is none, or it is hidden."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state = fields[0]
    return None if state in "ZX" else int(fields[19])


def _is_number_free(pid: int) -> bool:
    """Whether no process has the number; one that is dead and not yet reaped still has it."""
    try:
        os.kill(pid, 0)  # asks only whether it is there
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _started(pid) is None


def _machine() -> str:
    """Names the running kernel and the name space of its process numbers; empty where neither is
    known. Containers on one machine see other processes under the same numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _in_use(run: Path, holder: Holder | None) -> InputError:
    return InputError(
        f"run.dir={run} is in use: {holder or 'another process'} trains in it; wait for it or choose another run.dir"
    )
