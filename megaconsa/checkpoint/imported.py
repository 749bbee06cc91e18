"""Writes checkpoints of imported weights.

They hold no optimizer, gates or data position. The weights keep the precision they came in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaconsa.checkpoint.store import FORMAT_VERSION, MANIFEST
from megaconsa.checkpoint.writer import file_entry, sync, write_json
from megaconsa.consa.allocation import Allocation
from megaconsa.errors import RunError
from megaconsa.files import new_folder
from megaconsa.model.config import ModelConfig
from megaconsa.tensor_files import write_tensors


def write(
    out: Path,
    model_config: ModelConfig,
    dtype: torch.dtype,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    *,
    allocation: Allocation | None,
    fingerprint: str | None,
    origin: dict[str, Any],
    add_files: Callable[[Path], None],
    advance: Callable[[int], None],
) -> None:
    """Writes the checkpoint folder `out`.

    The folder appears when it is complete and on the disk. Memory holds one tensor at a time.

    shapes: canonical name -> shape of every weight.
    read: returns a weight by its name, unsharded and in original head order.
    fingerprint: of the tokenizer.
    add_files: puts further files into the folder.
    advance: is called with the number of bytes as they are written.

    Raises RunError if the disk fails. Then nothing is left behind.
    """
    started = time.monotonic()
    with new_folder(out) as folder:
        write_tensors(folder / "model.safetensors", shapes, dtype, read, advance)
        if allocation is not None:
            allocation.save(folder / "allocation.json")
        add_files(folder)
        state = {
            "version": FORMAT_VERSION,
            "step": 0,
            "tokens": 0,
            "sequences": 0,
            "shape": asdict(model_config),
            "data": {"tokenizer_fingerprint": fingerprint},
            "imported": {**origin, "dtype": str(dtype).removeprefix("torch.")},
        }
        write_json(folder / "state.json", state)
        files: dict[str, Any] = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            files[str(path.relative_to(folder))] = file_entry(path)[path.name]
        written = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "seconds": round(time.monotonic() - started, 2),
        }
        manifest = {"version": FORMAT_VERSION, "files": files, "written": written}
        write_json(folder / MANIFEST, manifest)
        sync(folder / MANIFEST)
    try:
        sync(out.parent)
    except OSError as error:
        raise RunError(f"out={out} may not have reached the disk: {error.strerror}") from error
