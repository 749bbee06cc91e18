"""Writes checkpoints while training continues. Each rank writes its own files, and the main rank
commits the checkpoint by a rename.

A save has three steps:

1. Each rank copies what it will write into host memory (Staging). Training waits only for this.
2. A thread of each rank writes the copy and syncs it to the disk.
3. When all ranks are done, the main rank's thread adds the manifest and renames the folder.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megaconsa import run_folder
from megaconsa.checkpoint.store import FORMAT_VERSION, MANIFEST, checksum, committed
from megaconsa.consa.allocation import Allocation
from megaconsa.tensor_files import Rows, write_rows

logger = logging.getLogger(__name__)

VISIBLE_SECONDS = 20
"""How long to wait for a file of another node to become visible. NFS caches attributes for a few
seconds."""
LIBRARIES = ("megaconsa", "torch", "deepspeed", "mosaicml-streaming", "safetensors")


Files = dict[str, dict[str, Any]]
"""Entries of a manifest: name -> size and checksum."""


class Staging:
    """Host memory for one rank's share of a checkpoint.

    Every checkpoint uses the same memory again. It is pinned for tensors that are on a GPU.
    """

    def __init__(self) -> None:
        self._held: dict[str | Rows, Tensor] = {}

    def copy(self, tensors: Iterable[tuple[str | Rows, Tensor]]) -> dict[str | Rows, Tensor]:
        """Returns copies of all tensors. Training may change the originals afterwards."""
        copies = {}
        cuda = False
        for name, tensor in tensors:
            if name not in self._held:
                self._held[name] = torch.empty(
                    tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
                )
            copies[name] = self._held[name].copy_(tensor.detach(), non_blocking=True)
            cuda = cuda or tensor.is_cuda
        if cuda:
            torch.cuda.current_stream().synchronize()
        return copies


@dataclass(frozen=True)
class Snapshot:
    """What one rank adds to a checkpoint. Its content must not change while it is written."""

    step: int
    weights: Mapping[Any, Tensor]
    """Whole tensors by name, and rows of tensors that several ranks write (`Rows`)."""
    moments: Mapping[Any, Tensor]
    random: dict[str, Tensor]
    """This rank's random states, by device type."""
    state: dict[str, Any] | None = None
    """Content of state.json. Only the main rank has this and the fields below."""
    gates: dict[str, Tensor] | None = None
    allocation: Allocation | None = None


@dataclass(frozen=True)
class Result:
    """How a write ended. It is the same on every rank."""

    step: int
    seconds: float
    error: str | None
    """None if the checkpoint was committed."""


@dataclass
class Writer:
    """Writes the checkpoints of a run, one at a time.

    Every rank has a writer and calls its methods at the same steps.
    """

    run: Path
    keep: int
    """How many of the newest checkpoints to keep."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept forever. 0 turns this off."""
    rank: int = 0
    ranks: int = 1
    launch: str = ""
    """Launch ID: the same on all ranks, unique to this launch."""
    exchange: Callable[[Any], list[Any]] = lambda value: [value]
    """All-gathers one value per rank, in rank order. It is called from the writer's thread."""
    _thread: threading.Thread | None = None
    _result: Result | None = None

    def clean(self) -> None:
        """Removes what a killed process left of its last write.

        Only the main rank calls this, before any rank writes.
        """
        for leftover in (self.run / run_folder.CHECKPOINTS).glob(".step_*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def begin(self, snapshot: Snapshot, stall: float = 0.0) -> None:
        """Starts to write `snapshot`. The caller must have waited for the previous write.

        stall: how long training waited, in seconds. It goes into the manifest.
        """
        assert self._thread is None
        # The thread is a daemon, because a rank whose peers are gone must not wait for them when it
        # exits. Stopping it is safe: until the rename, no checkpoint exists that could break.
        self._thread = threading.Thread(target=self._write, args=(snapshot, stall), daemon=True)
        self._thread.start()

    def poll(self) -> Result | None:
        """Returns how the last write ended, without waiting. Each result is returned once.

        Returns None if no write has ended since the last result.
        """
        if self._thread is None or self._thread.is_alive():
            return None
        return self.wait(0)

    def wait(self, timeout: float | None = None) -> Result | None:
        """Waits for the current write and returns how it ended. Each result is returned once.

        timeout: in seconds. Returns None if there is no write, or if it takes longer.
        """
        if self._thread is None:
            return None
        self._thread.join(timeout)
        if self._thread.is_alive():
            return None
        result = self._result
        self._thread = None
        self._result = None
        return result

    def _write(self, snapshot: Snapshot, stall: float) -> None:
        """Runs in the thread. Sets the result in any case."""
        started = time.monotonic()
        try:
            error = self._write_together(snapshot, stall, started)
        except Exception as lost:  # another rank is gone
            error = f"the ranks could not agree: {lost}"
        self._result = Result(snapshot.step, time.monotonic() - started, error)

    def _write_together(self, snapshot: Snapshot, stall: float, started: float) -> str | None:
        """Writes this rank's files and commits together with the other ranks.

        Returns what went wrong on any rank, or None.
        """
        # The folder belongs to this launch alone. If the main rank of an earlier launch was killed,
        # its other ranks may still be writing.
        launch = f".{self.launch}" if self.launch else ""
        temporary = self.run / run_folder.CHECKPOINTS / f".step_{snapshot.step}{launch}.tmp"
        files: Files = {}
        begun: dict[str, int] = {}
        error = None
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            suffix = f"-{self.rank + 1:05}-of-{self.ranks:05}" if self.ranks > 1 else ""
            for kind, tensors in (("model", snapshot.weights), ("optimizer", snapshot.moments)):
                whole = {name: each for name, each in tensors.items() if isinstance(name, str)}
                if whole:
                    files |= _write_tensors(temporary / f"{kind}{suffix}.safetensors", whole)
                for rows, tensor in tensors.items():
                    if isinstance(rows, Rows):
                        begun |= _write_rows(temporary, kind, rows, tensor)
        except Exception as failed:  # catches everything, since the other ranks wait for an answer
            error = _describe(failed)
        shares = self.exchange((files, begun, snapshot.random, error))
        error = self._joined([failure for *_, failure in shares])
        written = [own for own, *_ in shares]
        if error is None and any(begun for _, begun, *_ in shares):
            written, error = self._finish(temporary, files, begun)
        random = [states for *_, states, _ in shares]
        if self.rank == 0 and error is None:
            timings = {"stall_seconds": stall, "write_seconds": time.monotonic() - started}
            try:
                self._commit(temporary, snapshot, written, random, timings)
            except Exception as failed:
                error = _describe(failed)
        if self.rank == 0 and error is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        agreed: str | None = self.exchange(error)[0]
        return agreed

    def _finish(
        self, temporary: Path, files: Files, begun: dict[str, int]
    ) -> tuple[list[Files], str | None]:
        """Adds the files that several ranks have written to those of the ranks that began them.

        Every rank has written its rows. begun: the size of each file that this rank began.

        Returns the files of every rank, and what went wrong on any rank.
        """
        error = None
        try:
            for name, size in begun.items():
                _await(temporary / name, size, self.rank)
                files |= file_entry(temporary / name)
        except Exception as failed:
            error = _describe(failed)
        shares = self.exchange((files, error))
        return [own for own, _ in shares], self._joined([failure for _, failure in shares])

    def _joined(self, failures: list[str | None]) -> str | None:
        """The errors of all ranks in one, or None if there are none."""
        errors = []
        for rank, failure in enumerate(failures):
            if failure:
                errors.append(f"rank {rank}: {failure}" if self.ranks > 1 else failure)
        return "; ".join(errors) or None

    def _commit(
        self,
        temporary: Path,
        snapshot: Snapshot,
        written: list[Files],
        states: list[dict[str, Tensor]],
        timings: dict[str, float],
    ) -> None:
        """Adds the files that belong to no single rank, and makes the folder a checkpoint.

        written, states: files and random states of every rank.
        """
        files: Files = {}
        for rank, own in enumerate(written):
            for name, entry in own.items():
                _await(temporary / name, entry["bytes"], rank)
            files |= own
        random = {}
        for rank, of_rank in enumerate(states):
            for device, state in of_rank.items():
                random[f"{rank}/{device}"] = state
        files |= _write_tensors(temporary / "random.safetensors", random)
        if snapshot.gates is not None:
            files |= _write_tensors(temporary / "gates.safetensors", snapshot.gates)
        if snapshot.allocation is not None:
            snapshot.allocation.save(temporary / "allocation.json")
            files |= file_entry(temporary / "allocation.json")
        libraries = {name: version(name) for name in LIBRARIES}
        content = {"version": FORMAT_VERSION, **(snapshot.state or {}), "versions": libraries}
        write_json(temporary / "state.json", content)
        files |= file_entry(temporary / "state.json")
        manifest = {
            "version": FORMAT_VERSION,
            "files": dict(sorted(files.items())),
            "written": {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **timings},
        }
        write_json(temporary / MANIFEST, manifest)
        sync(temporary / MANIFEST)
        sync(temporary)
        final = temporary.with_name(f"step_{snapshot.step}")
        # A damaged checkpoint of this step may exist, which the run skipped. It is only renamed now
        # and removed after the commit. If the process were killed while it removed files one by
        # one, neither checkpoint would be left.
        replaced = _put_aside(final) if final.exists() else None
        temporary.rename(final)
        sync(final.parent)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
        self._remove_old(final)

    def _remove_old(self, newest: Path) -> None:
        """Removes older checkpoints that are not to be kept.

        A checkpoint that is being read stays until the next save.
        """
        paths = committed(self.run)
        # Checkpoints of later steps are damaged ones that the run skipped. They do not count.
        for path in paths[paths.index(newest) + self.keep :]:
            if is_kept_for_ever(path, self.keep_every):
                continue
            if _is_in_use(path):
                logger.info("checkpoint %s stays: it is being read", path)
                continue
            try:
                _remove(path)
            except OSError as error:
                logger.warning("checkpoint %s could not be removed: %s", path, error)


def is_kept_for_ever(path: Path, keep_every: int) -> bool:
    """Whether the step of a checkpoint is a multiple of `checkpoint.keep_every`."""
    step = int(path.name.removeprefix("step_"))
    return keep_every > 0 and step % keep_every == 0


def _await(path: Path, size: int, rank: int) -> None:
    """Waits until another rank's file is visible here.

    On one machine it is visible at once, on a shared file system soon. Raises OSError if it is not
    visible after VISIBLE_SECONDS.
    """
    for _ in range(VISIBLE_SECONDS * 10):
        with suppress(FileNotFoundError):
            if path.stat().st_size == size:
                return
        time.sleep(0.1)
    raise OSError(
        f"rank 0 does not see {path}, which rank {rank} wrote; "
        "run.dir must be on a file system that all nodes share"
    )


def _write_rows(folder: Path, kind: str, rows: Rows, tensor: Tensor) -> dict[str, int]:
    """Writes rows of a tensor that several ranks write. They are on the disk when this returns.

    Returns the file's name and its size with all rows, if these are the first ones.
    """
    path = folder / f"{kind}-{rows.name.replace('/', '.')}.safetensors"
    size = write_rows(path, rows, tensor)
    sync(path)
    return {path.name: size} if rows.first == 0 else {}


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> Files:
    """Writes a safetensors file and returns its manifest entry."""
    save_file(tensors, path, {"format": "pt"})
    return file_entry(path)


def file_entry(path: Path) -> Files:
    """Returns the manifest entry of a file: name -> size and checksum.

    The file is on the disk when this returns.
    """
    sync(path)
    return {path.name: {"bytes": path.stat().st_size, "xxh3_64": checksum(path)}}


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Writes `data` as indented JSON."""
    path.write_text(json.dumps(data, indent=1) + "\n")


def _remove(path: Path) -> None:
    """Removes a checkpoint, which loses its name first."""
    shutil.rmtree(_put_aside(path))


def _put_aside(path: Path) -> Path:
    """Renames a checkpoint before its removal, and returns the new path.

    A folder named step_N must be complete at any moment.
    """
    aside = path.with_name(f".{path.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return aside


def _is_in_use(path: Path) -> bool:
    """Whether a process holds the checkpoint's read lock (`Checkpoint.in_use`).

    Any unexpected error also counts as in use.
    """
    try:
        # NFS grants an exclusive lock only on a file that is open for writing.
        with (path / MANIFEST).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
    return False


def sync(path: Path) -> None:
    """Waits until the content of a file or folder is on the disk.

    Otherwise a rename may survive a crash, but not the data of the renamed file.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _describe(error: Exception) -> str:
    """Returns the text of an error, or its type if it has no text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
