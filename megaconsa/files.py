"""Writing a file or a folder so that a reader sees the old content or the new, never a part."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megaconsa.errors import InputError, RunError


def replace_text(path: Path, text: str) -> None:
    """Writes `text` to `path`, making its folder; under another name first, which then takes the place of the old file."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """As replace_text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def parse_json(text: str | bytes) -> Any:
    """json.loads for files that come from elsewhere: ValueError for all that is not JSON, and for what nests too deep to read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deep") from None


def is_bare_name(name: object) -> bool:
    """Whether `name` names a file of a folder, and no other place: no separator, not the folder itself or the one above."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and "/" not in name
        and "\\" not in name
        and "\0" not in name
    )


def is_inside_name(name: object) -> bool:
    """Whether `name` names a file below a folder: bare names joined by slashes."""
    return isinstance(name, str) and all(map(is_bare_name, name.split("/")))


def check_new_folder(out: Path) -> None:
    """Raises InputError where `out` is there already and is not an empty folder."""
    try:
        out.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"out={out} cannot be written: {error.strerror}") from None
    if out.is_symlink():
        raise InputError(f"out={out} is a link; name the folder itself")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"out={out} exists and is not an empty folder; choose another or remove it"
        )


def binary_size(count: float) -> str:
    """`count` bytes in the largest binary unit that leaves at least 1."""
    unit = 0
    while count >= 1024 and unit < 4:
        count, unit = count / 1024, unit + 1
    return f"{count:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def check_space(out: Path, needed: int) -> None:
    """Raises InputError where the disk on which `out` will lie has fewer than `needed` bytes free."""
    nearest = next(parent for parent in out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(nearest).free
    if free < needed:
        raise InputError(
            f"out={out} needs {binary_size(needed)}, but {binary_size(free)} are free there"
        )


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name at the end, or goes away with whatever stopped the work.

    RunError where that was an OSError, mostly of the disk.
    """
    out = out.absolute()
    folder = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"out={out} cannot be written: {error.strerror}") from None
    try:
        yield folder
        folder.replace(out)
    except BaseException as error:
        shutil.rmtree(
            folder, ignore_errors=True
        )  # a disk that fails may fail here too; what it failed at first is told
        if isinstance(error, OSError):
            raise RunError(f"out={out} could not be written: {error.strerror or error}") from error
        raise
