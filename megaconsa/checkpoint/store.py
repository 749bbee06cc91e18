"""Writing and reading checkpoints.

A checkpoint is RUN/checkpoints/step_N with

    model.safetensors       fp32 master weights by canonical name
    optimizer.safetensors   Adam's moments, `exp_avg/<name>` and `exp_avg_sq/<name>`
    gates.safetensors       while learning: log_alpha, multipliers and their optimizers' states
    allocation.json         otherwise: the table the run trains on
    state.json              step, tokens, data position, configuration, shape, tokenizer, library versions
    manifest.json           every file's size and xxh3 checksum

It is written beside its place under another name, synced and renamed, so that a folder named step_N is always whole. No pickle is
read or written.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megaconsa.consa.allocation import Allocation
from megaconsa.errors import InputError, RunError
from megaconsa.model.config import ModelConfig

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
FOLDER = "checkpoints"
_NAME = re.compile(r"step_(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint. `state` is the content of state.json."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def shape(self) -> ModelConfig:
        return ModelConfig(**self.state["shape"])

    @property
    def allocation(self) -> Allocation | None:
        """The table that the run trained on; None while it was learning."""
        path = self.path / "allocation.json"
        return Allocation.load(path) if path.exists() else None

    def weights(self) -> dict[str, Tensor]:
        return load_file(self.path / "model.safetensors")

    def moments(self) -> dict[str, Tensor]:
        return load_file(self.path / "optimizer.safetensors")

    def gates(self) -> dict[str, Tensor] | None:
        path = self.path / "gates.safetensors"
        return load_file(path) if path.exists() else None

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes without reading the weights."""
        with safe_open(self.path / "model.safetensors", "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def faults(self) -> list[str]:
        """What does not agree with the manifest: missing files, sizes, checksums."""
        found = []
        for name, entry in json.loads((self.path / "manifest.json").read_text())["files"].items():
            path = self.path / name
            if not path.exists():
                found.append(f"{path} is missing")
            elif path.stat().st_size != entry["bytes"]:
                found.append(f"{path} has {path.stat().st_size} bytes instead of {entry['bytes']}")
            elif _checksum(path) != entry["xxh3_64"]:
                found.append(f"{path} does not match its checksum")
        return found


def save(
    run: Path,
    state: dict[str, Any],
    *,
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    gates: dict[str, Tensor] | None,
    allocation: Allocation | None,
    keep: int,
) -> Path:
    """Writes and commits step_N (N is state["step"]), then removes all but the `keep` newest checkpoints. Returns its folder."""
    folder = run / FOLDER
    final = folder / f"step_{state['step']}"
    temporary = folder / f".{final.name}.tmp"
    for leftover in folder.glob(".step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write(temporary, state, weights, moments, gates, allocation)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"checkpoint {final} could not be written: {error}") from None
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)
    _sync(folder)
    # Only what is older than this one: a later folder can only be a damaged one that the run passed over.
    committed = _committed(run)
    for old in committed[committed.index(final) + keep :]:
        shutil.rmtree(old)
    return final


def _write(
    temporary: Path,
    state: dict[str, Any],
    weights: dict[str, Tensor],
    moments: dict[str, Tensor],
    gates: dict[str, Tensor] | None,
    allocation: Allocation | None,
) -> None:
    """Writes all files of a checkpoint and waits until they are on the disk."""
    save_file(weights, temporary / "model.safetensors", {"format": "pt"})
    save_file(moments, temporary / "optimizer.safetensors", {"format": "pt"})
    if gates is not None:
        save_file({name: value.detach().cpu().contiguous() for name, value in gates.items()}, temporary / "gates.safetensors")
    if allocation is not None:
        allocation.save(temporary / "allocation.json")
    versions = {name: version(name) for name in ("megaconsa", "torch", "deepspeed", "mosaicml-streaming", "safetensors")}
    _write_json(temporary / "state.json", {"version": FORMAT_VERSION, **state, "versions": versions})
    files = {path.name: {"bytes": path.stat().st_size, "xxh3_64": _checksum(path)} for path in sorted(temporary.iterdir())}
    _write_json(temporary / "manifest.json", {"version": FORMAT_VERSION, "files": files})
    for path in [*temporary.iterdir(), temporary]:
        _sync(path)


def newest(run: Path) -> Checkpoint | None:
    """The newest checkpoint of a run folder that agrees with its manifest; says which ones it passed over.

    None where there is no checkpoint; InputError where there are some but none is usable: that is not a run to start again.
    """
    committed = _committed(run)
    for path in committed:
        try:
            checkpoint = _open(path)
            faults = checkpoint.faults()
        except InputError as error:
            faults = [str(error)]
        if not faults:
            return checkpoint
        logger.warning("checkpoint %s is passed over: %s", path, faults[0])
    if committed:
        raise InputError(
            f"none of the {len(committed)} checkpoints in {run / FOLDER} is usable (of the oldest: {faults[0]}); "
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
            raise InputError(f"{path} holds no usable checkpoint; give a run folder that has one, or a checkpoint folder")
        return checkpoint
    checkpoint = _open(path)
    if faults := checkpoint.faults():
        raise InputError(f"checkpoint is damaged: {faults[0]}")
    return checkpoint


def _committed(run: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [(int(match[1]), path) for path in (run / FOLDER).glob("step_*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _open(path: Path) -> Checkpoint:
    try:
        state = json.loads((path / "state.json").read_text())
        manifest = json.loads((path / "manifest.json").read_text())
        if not isinstance(state, dict) or not all({"bytes", "xxh3_64"} <= entry.keys() for entry in manifest["files"].values()):
            raise ValueError("state.json or manifest.json is not what a checkpoint holds")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"checkpoint {path} cannot be read: {error}") from None
    if state.get("version") != FORMAT_VERSION:
        raise InputError(
            f"checkpoint {path} has format version {state.get('version')}, but this megaconsa reads {FORMAT_VERSION}"
        )
    return Checkpoint(path, state)


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        for block in _blocks(file.read):
            digest.update(block)
    return str(digest.hexdigest())


def _blocks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    while block := read(1 << 24):
        yield block


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n")


def _sync(path: Path) -> None:
    """Waits until a file's or folder's content is on the disk: a rename may otherwise survive a crash that its data does not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
