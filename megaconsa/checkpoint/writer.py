"""Writing a checkpoint behind training: every rank its own files, then one of them commits the whole by a rename.

A save takes three steps. Training waits for the first only: each rank copies what it writes into host memory (Staging). Then a thread
of each rank writes it and syncs it to the disk. When all have, the main rank's thread adds the manifest and renames the folder.
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
from collections.abc import Callable, Iterable
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

logger = logging.getLogger(__name__)

VISIBLE_SECONDS = 20
"""For a file that another node wrote to be seen here; attribute caches of NFS last a few seconds."""
LIBRARIES = ("megaconsa", "torch", "deepspeed", "mosaicml-streaming", "safetensors")


class Staging:
    """Host memory for one rank's share of one checkpoint, used again for the next; pinned where the tensors are on a GPU."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def copy(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Copies of all tensors; training may change the originals when it returns."""
        copies, cuda = {}, False
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
    """What one rank adds to a checkpoint. Nothing in it changes while it is written."""

    step: int
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    random: dict[str, Tensor]
    """This rank's random states, by device type."""
    state: dict[str, Any] | None = None
    """Content of state.json; on the main rank, which also has the following."""
    gates: dict[str, Tensor] | None = None
    allocation: Allocation | None = None


@dataclass(frozen=True)
class Result:
    """How a write ended, the same on every rank."""

    step: int
    seconds: float
    error: str | None
    """None where the checkpoint was committed."""


@dataclass
class Writer:
    """Writes the checkpoints of a run, one at a time. Every rank has one and calls its methods at the same steps."""

    run: Path
    keep: int
    """Newest checkpoints that stay."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this stay for ever; 0 keeps none for that."""
    rank: int = 0
    ranks: int = 1
    launch: str = ""
    """A name that all ranks share with nobody before or after them."""
    exchange: Callable[[Any], list[Any]] = lambda value: [value]
    """Takes one value of each rank, all in the order of ranks, to every rank; called from a thread of the writer's own."""
    _thread: threading.Thread | None = None
    _result: Result | None = None

    def clean(self) -> None:
        """Removes what a killed process left of its last write. On the main rank, before any rank writes."""
        for leftover in (self.run / run_folder.CHECKPOINTS).glob(".step_*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def begin(self, snapshot: Snapshot, stall: float = 0.0) -> None:
        """Starts to write; the write before must have been waited for. stall: seconds training stood still, for the manifest."""
        assert self._thread is None
        # A daemon: a rank whose peers are gone must not wait for them when it ends. Until the rename there is nothing to break off.
        self._thread = threading.Thread(target=self._write, args=(snapshot, stall), daemon=True)
        self._thread.start()

    def poll(self) -> Result | None:
        """How the last write ended, once, if it has ended by now."""
        return self.wait(0) if self._thread is not None and not self._thread.is_alive() else None

    def wait(self, timeout: float | None = None) -> Result | None:
        """Waits for the write under way and returns how it ended, once; None where there is none, or it is not over in time."""
        if self._thread is None:
            return None
        self._thread.join(timeout)
        if self._thread.is_alive():
            return None
        self._thread, result, self._result = None, self._result, None
        return result

    def _write(self, snapshot: Snapshot, stall: float) -> None:
        started = time.monotonic()
        try:
            error = self._write_together(snapshot, stall, started)
        except Exception as lost:  # another rank is gone
            error = f"the ranks could not agree: {lost}"
        self._result = Result(snapshot.step, time.monotonic() - started, error)

    def _write_together(self, snapshot: Snapshot, stall: float, started: float) -> str | None:
        """Writes this rank's files and commits with the others; returns what went wrong."""
        # Of this launch alone: ranks of one before whose main rank was killed may still be writing.
        launch = f".{self.launch}" if self.launch else ""
        temporary = self.run / run_folder.CHECKPOINTS / f".step_{snapshot.step}{launch}.tmp"
        files: dict[str, dict[str, Any]] = {}
        error = None
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            suffix = f"-{self.rank + 1:05}-of-{self.ranks:05}" if self.ranks > 1 else ""
            for kind, tensors in (("model", snapshot.weights), ("optimizer", snapshot.moments)):
                if tensors:
                    files |= _write_tensors(temporary / f"{kind}{suffix}.safetensors", tensors)
        except Exception as failed:  # whatever it is: the other ranks wait for an answer
            error = _describe(failed)
        shares = self.exchange((files, snapshot.random, error))
        errors = [
            f"rank {rank}: {share[2]}" if self.ranks > 1 else share[2]
            for rank, share in enumerate(shares)
            if share[2]
        ]
        error = "; ".join(errors) or None
        if self.rank == 0 and error is None:
            try:
                self._commit(
                    temporary,
                    snapshot,
                    shares,
                    {"stall_seconds": stall, "write_seconds": time.monotonic() - started},
                )
            except Exception as failed:
                error = _describe(failed)
        if self.rank == 0 and error is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        agreed: str | None = self.exchange(error)[0]
        return agreed

    def _commit(
        self, temporary: Path, snapshot: Snapshot, shares: list[Any], timings: dict[str, float]
    ) -> None:
        """Adds what is not any rank's own, and makes the folder a checkpoint."""
        files: dict[str, dict[str, Any]] = {}
        for rank, (share, _, _) in enumerate(shares):
            for name, entry in share.items():
                _await(temporary / name, entry["bytes"], rank)
            files |= share
        random = {
            f"{rank}/{device}": state
            for rank, share in enumerate(shares)
            for device, state in share[1].items()
        }
        files |= _write_tensors(temporary / "random.safetensors", random)
        if snapshot.gates is not None:
            files |= _write_tensors(temporary / "gates.safetensors", snapshot.gates)
        if snapshot.allocation is not None:
            snapshot.allocation.save(temporary / "allocation.json")
            files |= file_entry(temporary / "allocation.json")
        libraries = {name: version(name) for name in LIBRARIES}
        write_json(
            temporary / "state.json",
            {"version": FORMAT_VERSION, **(snapshot.state or {}), "versions": libraries},
        )
        files |= file_entry(temporary / "state.json")
        written = {"date": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **timings}
        write_json(
            temporary / MANIFEST,
            {"version": FORMAT_VERSION, "files": dict(sorted(files.items())), "written": written},
        )
        sync(temporary / MANIFEST)
        sync(temporary)
        final = temporary.with_name(f"step_{snapshot.step}")
        # A damaged one may be there, which the run passed over. It is only moved now: a process that
        # is killed while it removes file by file would leave neither.
        replaced = _put_aside(final) if final.exists() else None
        temporary.rename(final)
        sync(final.parent)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
        self._remove_old(final)

    def _remove_old(self, newest: Path) -> None:
        """Removes older checkpoints that are not to be kept. One that somebody reads just now stays until the next time."""
        paths = committed(self.run)
        # Later ones are damaged ones that the run passed over: they do not count.
        for path in paths[paths.index(newest) + self.keep :]:
            if self.keep_every and int(path.name.removeprefix("step_")) % self.keep_every == 0:
                continue
            if _is_in_use(path):
                logger.info("checkpoint %s stays: it is being read", path)
                continue
            try:
                _remove(path)
            except OSError as error:
                logger.warning("checkpoint %s could not be removed: %s", path, error)


def _await(path: Path, size: int, rank: int) -> None:
    """Waits until another rank's file is seen here too, as it is at once on one machine and soon on a shared file system."""
    for _ in range(VISIBLE_SECONDS * 10):
        with suppress(FileNotFoundError):
            if path.stat().st_size == size:
                return
        time.sleep(0.1)
    raise OSError(
        f"rank 0 does not see {path}, which rank {rank} wrote; run.dir must be on a file system that all nodes share"
    )


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    save_file(tensors, path, {"format": "pt"})
    return file_entry(path)


def file_entry(path: Path) -> dict[str, dict[str, Any]]:
    """The manifest's line on a file, which is on the disk when this returns."""
    sync(path)
    return {path.name: {"bytes": path.stat().st_size, "xxh3_64": checksum(path)}}


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")


def _remove(path: Path) -> None:
    """Removes a checkpoint."""
    shutil.rmtree(_put_aside(path))


def _put_aside(path: Path) -> Path:
    """Gives a checkpoint another name, and returns that: a folder named step_N is whole at any moment."""
    aside = path.with_name(f".{path.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    return aside


def _is_in_use(path: Path) -> bool:
    try:
        with (path / MANIFEST).open(
            "r+"
        ) as file:  # NFS locks exclusively only what is open for writing
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
    return False


def sync(path: Path) -> None:
    """Waits until a file's or folder's content is on the disk: a rename may otherwise survive a crash that its data does not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _describe(error: Exception) -> str:
    return (
        (error.strerror if isinstance(error, OSError) else None)
        or str(error)
        or type(error).__name__
    )
