"""Reads checkpoints: finds them, verifies them, and opens their content.

A checkpoint is RUN/checkpoints/step_N with

    model.safetensors       fp32 master weights by canonical name
    optimizer.safetensors   Adam's moments, `exp_avg/<name>` and `exp_avg_sq/<name>`
    gates.safetensors       while learning: each unit's evidence, and what its controller trains
    random.safetensors      torch's random states of every rank
    allocation.json         unless learning: the table the run trains on
    state.json              step, tokens, data position, losses, configuration, shape, tokenizer,
                            library versions
    manifest.json           every file's size and xxh3 checksum, when and how fast it was written

If there are several ranks, each writes its own file: model-00001-of-00008.safetensors and so on. A
large tensor that several ranks write has its own: model-model.embed_tokens.weight.safetensors. Each
tensor is stored whole in one of them, so that a checkpoint does not depend on the topology. A
folder named step_N is always complete, because writer.py gives it that name at the end. No pickle
is read or written.

Only reading tensors imports torch, so that checkpoints are listed and refused quickly.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from megaconsa import run_folder
from megaconsa.consa.allocation import Allocation
from megaconsa.data import TOKENIZER
from megaconsa.data.mixture_file import tokenizer_folder
from megaconsa.errors import InputError
from megaconsa.files import is_inside_name, parse_json
from megaconsa.model.config import ModelConfig
from megaconsa.reading import patiently, read_text
from megaconsa.run_paths import relocated, shown

if TYPE_CHECKING:
    from torch import Tensor

    from megaconsa.tensor_files import TensorFiles

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d+)")
CHECKING_THREADS = 8
"""Files whose checksums are computed in parallel."""
SECOND_LOOK_SECONDS = 2.0
"""Pause before apparent damage is checked again, because caches of a file system may lag behind."""


class DamagedError(InputError):
    """A checkpoint differs from what was written. A file that is out of reach is no damage."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    `state` and `manifest` hold the content of state.json and manifest.json. If the run was moved
    since, the paths in `state` are the present ones.
    """

    path: Path
    state: dict[str, Any]
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def imported(self) -> dict[str, Any] | None:
        """Source and precision of weights that import-hf wrote, or None for a run's checkpoint.

        An imported checkpoint holds no training state (imported.py).
        """
        imported: dict[str, Any] | None = self.state.get("imported")
        return imported

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig(**self.state["shape"])

    @property
    def allocation(self) -> Allocation | None:
        """The table that the run trained on. None while it was learning."""
        path = self.path / "allocation.json"
        return Allocation.load(path) if path.exists() else None

    @property
    def window(self) -> int | None:
        """Keys that a sliding-window head sees. None for an import in which all heads are full."""
        if self.imported:
            allocation = self.allocation
            if allocation is None or allocation.sparsity == 0:
                return None
            return allocation.window
        return int(self.state["config"]["attention"]["window"])

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer's folder: in the run's data, or in the import itself.

        None for an import without a tokenizer.
        """
        if not self.imported:
            return tokenizer_folder(Path(self.state["config"]["data"]["path"]))
        folder = self.path / TOKENIZER
        return folder if folder.is_dir() else None

    @property
    def origin(self) -> dict[str, Any]:
        """Where the weights come from: the run or the imported folder, the step and the tokens."""
        if self.imported:
            folder = self.imported["folder"]
        else:
            folder = shown(self.state["config"]["run"]["dir"])
        return {"run": folder, "step": self.step, "tokens": self.state["tokens"]}

    @property
    def outcome(self) -> dict[str, Any]:
        """How the training has gone so far, for readers: losses in nats, length and data.

        An import knows none of this.
        """
        if self.imported:
            return {}
        config = self.state["config"]
        return {
            "loss": self.state.get("loss"),
            "validation_loss": self.state.get("validation_loss"),
            "sequence_length": config["training"]["sequence_length"],
            "data": config["data"]["path"],
        }

    @property
    def bytes(self) -> int:
        """Bytes of all files in the manifest."""
        return sum(entry["bytes"] for entry in self.manifest["files"].values())

    def weights(self) -> TensorFiles:
        return self._tensors("model")

    def moments(self) -> TensorFiles:
        return self._tensors("optimizer")

    def gates(self) -> dict[str, Tensor] | None:
        path = self.path / "gates.safetensors"
        return _load(path) if path.exists() else None

    def random_states(self) -> dict[str, Tensor]:
        """Torch's random states: `RANK/cpu` and, with a GPU, `RANK/cuda`."""
        return _load(self.path / "random.safetensors")

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights, without reading the weights."""
        weights = self.weights()
        return {name: weights.shape(name) for name in weights}

    def share(self, rank: int, ranks: int) -> list[str]:
        """The files that one rank checks if several ranks check the checkpoint together.

        Each file is in one rank's share. The shares are balanced by bytes.
        """
        sizes = {name: entry["bytes"] for name, entry in self.manifest["files"].items()}
        load = [0] * ranks
        own = []
        for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
            lightest = min(range(ranks), key=lambda each: load[each])
            load[lightest] += sizes[name]
            if lightest == rank:
                own.append(name)
        return own

    def faults(
        self,
        advance: Callable[[int], None] = lambda count: None,
        *,
        checksums: bool = True,
        names: Iterable[str] | None = None,
    ) -> dict[str, str]:
        """Compares the files with the manifest: existence, sizes and checksums.

        Every mismatch is checked a second time.

        advance: is called with the number of bytes as they are read.
        checksums: False reads no file.
        names: the files to check. None means all.

        Returns the names of files that differ, each with a sentence. Raises UnreachableError if
        files stay out of reach.
        """
        checked = list(self.manifest["files"] if names is None else names)

        def fault(name: str) -> str | None:
            found = self._fault(name, advance, checksums)
            if found is None:
                return None
            logger.warning("%s; looking again", found)
            time.sleep(SECOND_LOOK_SECONDS)
            _forget(self.path / name)
            return self._fault(name, lambda count: None, checksums)

        with ThreadPoolExecutor(CHECKING_THREADS) as pool:
            results = list(pool.map(fault, checked))
        return {
            name: found for name, found in zip(checked, results, strict=True) if found is not None
        }

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
            if found != entry["xxh3_64"]:
                return f"{path} does not match its checksum"
            return None
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            raise _refusal(path, error) from None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Protects the checkpoint from removal: a run that removes old checkpoints skips this one.

        Raises DamagedError if it was removed already, and InputError if it may not be read.
        """
        manifest = self.path / MANIFEST
        try:
            file = patiently(manifest.open, manifest)
        except OSError as error:
            raise _refusal(self.path, error) from None
        with file:
            with suppress(OSError):  # some file systems have no locks
                fcntl.flock(file, fcntl.LOCK_SH)
            yield

    def _tensors(self, kind: str) -> TensorFiles:
        from megaconsa.tensor_files import TensorFiles

        pattern = re.compile(rf"{kind}[-.].*safetensors$")
        paths = [self.path / name for name in self.manifest["files"] if pattern.match(name)]
        for path in paths:
            _await_opening(path)
        return TensorFiles(paths)


def newest(run: Path) -> Checkpoint | None:
    """Returns the newest checkpoint of a run folder that agrees with its manifest.

    Skipped checkpoints are logged. Returns None if there is no checkpoint.

    Raises InputError if there are checkpoints but none is usable, or if the newest has another
    format: such a run must not start from scratch. Raises UnreachableError if a checkpoint cannot
    be read at the moment, since it may be intact.
    """
    paths = committed(run)
    checkpoint, faults = newest_intact(paths, _examine)
    if checkpoint is None and paths:
        raise none_usable(run, paths, faults)
    return checkpoint


def newest_intact(
    paths: Sequence[Path], examine: Callable[[Path], tuple[Checkpoint, list[str]]]
) -> tuple[Checkpoint | None, list[str]]:
    """Returns the first checkpoint without faults, or None and the faults of the last one.

    examine: returns a checkpoint and its faults, or raises DamagedError.
    """
    faults: list[str] = []
    for path in paths:
        try:
            checkpoint, faults = examine(path)
        except DamagedError as error:
            faults = [str(error)]
        if not faults:
            return checkpoint, []
        logger.warning("checkpoint %s is passed over: %s", path, faults[0])
    return None, faults


def none_usable(run: Path, paths: Sequence[Path], faults: Sequence[str]) -> InputError:
    """The refusal of a run whose checkpoints are all damaged.

    faults: those of its oldest checkpoint.
    """
    return InputError(
        f"none of the {len(paths)} checkpoints in {run / run_folder.CHECKPOINTS} is usable "
        f"(of the oldest: {faults[0]}); "
        "restore one, or remove that folder to start again"
    )


def resolve(path: Path) -> Checkpoint:
    """Opens the checkpoint that a user means by a run folder or a checkpoint folder.

    Raises InputError if there is no intact one.
    """
    if is_run_folder(path):
        return existing(path, newest(path))
    return intact(*_examine(path))


def is_run_folder(path: Path) -> bool:
    """Whether a user means a run's newest checkpoint, and not the checkpoint in the folder itself.

    Raises InputError if there is no folder.
    """
    if not path.is_dir():
        raise InputError(f"{path} is neither a run folder nor a checkpoint: it does not exist")
    return not (path / "state.json").exists()


def existing(run: Path, checkpoint: Checkpoint | None) -> Checkpoint:
    """Returns a run's newest checkpoint. Raises InputError if there is none."""
    if checkpoint is None:
        raise InputError(
            f"{run} holds no usable checkpoint; "
            "give a run folder that has one, or a checkpoint folder"
        )
    return checkpoint


def intact(checkpoint: Checkpoint, faults: Sequence[str]) -> Checkpoint:
    """Returns a checkpoint that was examined. Raises InputError if it has faults."""
    if faults:
        raise InputError(f"checkpoint is damaged: {faults[0]}")
    return checkpoint


def _examine(path: Path) -> tuple[Checkpoint, list[str]]:
    """Returns a checkpoint and its faults. No run can remove it while its files are checked.

    Raises the same errors as `read`.
    """
    checkpoint = read(path)
    with checkpoint.in_use():
        return checkpoint, list(checkpoint.faults().values())


def newest_of(run: Path, count: int) -> list[Checkpoint]:
    """Returns the `count` newest checkpoints of a run folder.

    Raises InputError if there are fewer, or if one of them is damaged.
    """
    paths = committed(run)[:count]
    if len(paths) < count:
        raise InputError(
            f"{run} holds {len(paths)} checkpoints, not {count}; "
            "give a run folder that kept more, or ask for fewer"
        )
    return [resolve(path) for path in paths]


def is_name(name: str) -> bool:
    """Whether a folder of that name would be a checkpoint."""
    return _NAME.fullmatch(name) is not None


def committed(run: Path) -> list[Path]:
    """Returns the checkpoint folders of a run, newest first."""
    folder = run / run_folder.CHECKPOINTS
    try:
        names = patiently(lambda: os.listdir(folder), folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = []
    for name in names:
        if match := _NAME.fullmatch(name):
            step = int(match[1])
            found.append((step, folder / name))
    return [path for _, path in sorted(found, reverse=True)]


def read(path: Path) -> Checkpoint:
    """Opens a checkpoint without looking at its tensors.

    Raises DamagedError if state or manifest differ from what was written, InputError if they have
    another format, and UnreachableError if they stay out of reach.
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
            f"checkpoint {path} has format version {state.get('version')}, "
            f"but this megaconsa reads {FORMAT_VERSION}"
        )
    if "config" in state:  # an imported checkpoint has none
        state["config"] = relocated(state["config"], path.absolute().parent.parent)
    return Checkpoint(path, state, manifest)


def _load(path: Path) -> dict[str, Tensor]:
    """Reads all tensors of a small file."""
    from safetensors.torch import load_file

    _await_opening(path)
    return load_file(path)


def _await_opening(path: Path) -> None:
    """Waits until a file can be opened.

    safetensors would report every failure to open as a missing file.
    """
    patiently(lambda: path.open("rb").close(), path, within=path.parent)


def _refusal(path: Path, error: OSError) -> InputError:
    """Makes the exception for an error that is final.

    A missing file is damage. Everything else, such as permissions, is for a person to fix.
    """
    kind = DamagedError if isinstance(error, FileNotFoundError | NotADirectoryError) else InputError
    return kind(f"checkpoint {path} cannot be read: {error}")


def _forget(path: Path) -> None:
    """Drops a file from this machine's page cache, so that the next read goes to the disk."""
    with suppress(OSError), path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def checksum(path: Path, advance: Callable[[int], None] = lambda count: None) -> str:
    """Returns the xxh3_64 of a file, in hexadecimal.

    advance: is called with the number of bytes as they are read.
    """
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
            advance(len(block))
    return str(digest.hexdigest())
