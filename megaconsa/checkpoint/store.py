"""Reading checkpoints: which there are, whether they are whole, what they hold.

A checkpoint is RUN/checkpoints/step_N with

    model.safetensors       fp32 master weights by canonical name
    optimizer.safetensors   Adam's moments, `exp_avg/<name>` and `exp_avg_sq/<name>`
    gates.safetensors       while learning: each unit's evidence, and what its controller trains
    random.safetensors      torch's random states of every rank
    allocation.json         unless learning: the table the run trains on
    state.json              step, tokens, data position, losses, configuration, shape, tokenizer, library versions
    manifest.json           every file's size and xxh3 checksum, when and how fast it was written

Several ranks write a file each: model-00001-of-00008.safetensors and so on. Every tensor is whole in one of them, so that a
checkpoint means the same whatever the topology. A folder named step_N is always whole: writer.py renames it to that when it is. No pickle
is read or written.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from safetensors.torch import load_file
from torch import Tensor

from megaconsa import run_folder
from megaconsa.consa.allocation import Allocation
from megaconsa.data import TOKENIZER
from megaconsa.errors import InputError
from megaconsa.files import is_inside_name, parse_json
from megaconsa.model.config import ModelConfig
from megaconsa.reading import patiently, read_text
from megaconsa.run_paths import relocated, shown
from megaconsa.tensor_files import TensorFiles

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d+)")
CHECKING_THREADS = 8
"""Files whose checksums are computed side by side."""
SECOND_LOOK_SECONDS = 2.0
"""Before what looks like damage is looked at again: caches of a file system may lag behind."""


class DamagedError(InputError):
    """A checkpoint is not what was written. What merely cannot be read is not damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint. `state` and `manifest` are the contents of its files of these names.

    Where the run was moved since, paths in the state are those that hold now.
    """

    path: Path
    state: dict[str, Any]
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def imported(self) -> dict[str, Any] | None:
        """Where the weights came from and in which precision, if by import-hf: then nothing but weights is held (imported.py)."""
        imported: dict[str, Any] | None = self.state.get("imported")
        return imported

    @property
    def shape(self) -> ModelConfig:
        return ModelConfig(**self.state["shape"])

    @property
    def allocation(self) -> Allocation | None:
        """The table that the run trained on; None while it was learning."""
        path = self.path / "allocation.json"
        return Allocation.load(path) if path.exists() else None

    @property
    def window(self) -> int | None:
        """Keys that a sliding-window head sees; None for an import in which all heads are full."""
        if self.imported:
            return self.allocation.window if self.allocation and self.allocation.sparsity else None
        return int(self.state["config"]["attention"]["window"])

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer's folder, that of the run's data or the import's own; None for an import without one."""
        if not self.imported:
            return Path(self.state["config"]["data"]["path"]) / TOKENIZER
        folder = self.path / TOKENIZER
        return folder if folder.is_dir() else None

    @property
    def origin(self) -> dict[str, Any]:
        """The run or the imported folder that the weights are of, step and tokens."""
        begun = (
            self.imported["folder"] if self.imported else shown(self.state["config"]["run"]["dir"])
        )
        return {"run": begun, "step": self.step, "tokens": self.state["tokens"]}

    @property
    def bytes(self) -> int:
        return sum(entry["bytes"] for entry in self.manifest["files"].values())

    def weights(self) -> TensorFiles:
        return self._tensors("model")

    def moments(self) -> TensorFiles:
        return self._tensors("optimizer")

    def gates(self) -> dict[str, Tensor] | None:
        path = self.path / "gates.safetensors"
        return _load(path) if path.exists() else None

    def random_states(self) -> dict[str, Tensor]:
        """`RANK/cpu` and, of a GPU, `RANK/cuda`."""
        return _load(self.path / "random.safetensors")

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes without reading the weights."""
        weights = self.weights()
        return {name: weights.shape(name) for name in weights}

    def faults(
        self, advance: Callable[[int], None] = lambda count: None, *, checksums: bool = True
    ) -> list[str]:
        """What does not agree with the manifest, looked at twice: missing files, sizes, checksums.

        advance is told of bytes as they are read. checksums: False reads no file. Raises
        UnreachableError where files stay out of reach.
        """

        def fault(name: str) -> str | None:
            found = self._fault(name, advance, checksums)
            if found is None:
                return None
            logger.warning("%s; looking again", found)
            time.sleep(SECOND_LOOK_SECONDS)
            _forget(self.path / name)
            return self._fault(name, lambda count: None, checksums)

        with ThreadPoolExecutor(CHECKING_THREADS) as pool:
            return [found for found in pool.map(fault, self.manifest["files"]) if found is not None]

    def _fault(self, name: str, advance: Callable[[int], None], checksums: bool) -> str | None:
        path = self.path / name
        entry = self.manifest["files"][name]
        try:
            size = patiently(path.stat, path, within=self.path).st_size
            if size != entry["bytes"]:
                return f"{path} has {size} bytes instead of {entry['bytes']}"
            if not checksums:
                return None
            found = patiently(lambda: checksum(path, advance), path, within=self.path)
            return None if found == entry["xxh3_64"] else f"{path} does not match its checksum"
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            raise _refusal(path, error) from None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within it a run that removes old checkpoints leaves this one.

        Raises DamagedError where it was removed, and InputError where it may not be read.
        """
        manifest = self.path / MANIFEST
        try:
            file = patiently(manifest.open, manifest)
        except OSError as error:
            raise _refusal(self.path, error) from None
        with file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_SH)
            yield

    def _tensors(self, kind: str) -> TensorFiles:
        names = [
            name for name in self.manifest["files"] if re.match(rf"{kind}[-.].*safetensors$", name)
        ]
        paths = [self.path / name for name in names]
        for path in paths:
            _await_opening(path)
        return TensorFiles(paths)


def newest(run: Path) -> Checkpoint | None:
    """The newest checkpoint of a run folder that agrees with its manifest; says which ones it passed over.

    None where there is no checkpoint. Raises InputError where there are some but none is usable, or
    the newest is of another format: such a run is not started again. Raises UnreachableError where one
    cannot be read at the moment: it may be whole.
    """
    paths = committed(run)
    for path in paths:
        try:
            checkpoint, faults = _examine(path)
        except DamagedError as error:
            faults = [str(error)]
        if not faults:
            return checkpoint
        logger.warning("checkpoint %s is passed over: %s", path, faults[0])
    if paths:
        raise InputError(
            f"none of the {len(paths)} checkpoints in {run / run_folder.CHECKPOINTS} is usable (of the oldest: {faults[0]}); "
            "restore one, or remove that folder to start again"
        )
    return None


def resolve(path: Path) -> Checkpoint:
    """The checkpoint that a user means by a run folder or a checkpoint folder; InputError where there is none that is whole."""
    if not path.is_dir():
        raise InputError(f"{path} is neither a run folder nor a checkpoint: it does not exist")
    if not (path / "state.json").exists():
        checkpoint = newest(path)
        if checkpoint is None:
            raise InputError(
                f"{path} holds no usable checkpoint; give a run folder that has one, or a checkpoint folder"
            )
        return checkpoint
    checkpoint, faults = _examine(path)
    if faults:
        raise InputError(f"checkpoint is damaged: {faults[0]}")
    return checkpoint


def _examine(path: Path) -> tuple[Checkpoint, list[str]]:
    """A checkpoint and its faults; it stays while its files are read. InputError as of `read`."""
    checkpoint = read(path)
    with checkpoint.in_use():
        return checkpoint, checkpoint.faults()


def newest_of(run: Path, count: int) -> list[Checkpoint]:
    """The `count` newest checkpoints of a run folder, all of them whole; InputError where there are fewer."""
    paths = committed(run)[:count]
    if len(paths) < count:
        raise InputError(
            f"{run} holds {len(paths)} checkpoints, not {count}; give a run folder that kept more, or ask for fewer"
        )
    return [resolve(path) for path in paths]


def committed(run: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    folder = run / run_folder.CHECKPOINTS
    try:
        names = patiently(lambda: os.listdir(folder), folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [(int(match[1]), folder / name) for name in names if (match := _NAME.fullmatch(name))]
    return [path for _, path in sorted(found, reverse=True)]


def read(path: Path) -> Checkpoint:
    """A checkpoint whose tensors have not been looked at.

    Raises DamagedError where state or manifest are not what was written, InputError where they have
    another format, and UnreachableError where they stay out of reach.
    """
    try:
        return _read(path)
    except DamagedError as error:
        logger.warning("%s; looking again", error)
        time.sleep(SECOND_LOOK_SECONDS)
        return _read(path)


def _read(path: Path) -> Checkpoint:
    try:
        state = parse_json(read_text(path / "state.json"))
        manifest = parse_json(read_text(path / MANIFEST))
        if (
            not isinstance(state, dict)
            or "version" not in state
            or not all({"bytes", "xxh3_64"} <= entry.keys() for entry in manifest["files"].values())
        ):
            raise ValueError("state.json or manifest.json is not what a checkpoint holds")
        for name in manifest["files"]:
            if not is_inside_name(name):
                raise ValueError(
                    f"{MANIFEST} names {name!r}, which is no file of the checkpoint's folder"
                )
    except OSError as error:
        raise _refusal(path, error) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedError(f"checkpoint {path} cannot be read: {error}") from None
    if state.get("version") != FORMAT_VERSION:
        raise InputError(
            f"checkpoint {path} has format version {state.get('version')}, but this megaconsa reads {FORMAT_VERSION}"
        )
    if "config" in state:  # otherwise imported
        state["config"] = relocated(state["config"], path.absolute().parent.parent)
    return Checkpoint(path, state, manifest)


def _load(path: Path) -> dict[str, Tensor]:
    """The tensors of a small file."""
    _await_opening(path)
    return load_file(path)


def _await_opening(path: Path) -> None:
    """Waits until a file can be opened. safetensors reports every failure to open as a missing file."""
    patiently(lambda: path.open("rb").close(), path, within=path.parent)


def _refusal(path: Path, error: OSError) -> InputError:
    """The refusal for an error that is an answer: a missing file is damage, and a person must mend
    permissions."""
    kind = DamagedError if isinstance(error, FileNotFoundError | NotADirectoryError) else InputError
    return kind(f"checkpoint {path} cannot be read: {error}")


def _forget(path: Path) -> None:
    """Drops what this machine's memory holds of a file, so that the next read asks the disk."""
    with suppress(OSError), path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def checksum(path: Path, advance: Callable[[int], None] = lambda count: None) -> str:
    """xxh3_64 of a file, in hexadecimal."""
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
            advance(len(block))
    return str(digest.hexdigest())
