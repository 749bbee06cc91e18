"""Writing files and folders atomically.

A reader sees either the old content or the new content, never a part of it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megaconsa.errors import InputError, RunError


def replace_text(path: Path, text: str) -> None:
    """Writes `text` to `path` and creates its folder.

    The text is written under a temporary name first. Then a rename replaces the old file.
    """
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, content: bytes) -> None:
    """Writes `content` to `path`, as `replace_text` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def parse_json(text: str | bytes, each: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Parses JSON that comes from elsewhere.

    each: replaces every object by what it returns, the inner ones first. A large file thus never
        lies in memory as dictionaries.

    Raises ValueError if it is not JSON, or if it nests too deep to read.
    """
    try:
        return json.loads(text, object_hook=each)
    except RecursionError:
        raise ValueError("it nests too deep") from None


def is_bare_name(name: object) -> bool:
    """Whether `name` can only name a file directly in a folder.

    It has no separator, and it is not the folder itself or its parent.
    """
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and "/" not in name
        and "\\" not in name
        and "\0" not in name
    )


def is_inside_name(name: object) -> bool:
    """Whether `name` can only name a file below a folder: bare names joined by slashes."""
    return isinstance(name, str) and all(map(is_bare_name, name.split("/")))


def check_new_folder(out: Path) -> None:
    """Raises InputError if `out` exists and is not an empty folder."""
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
    """`count` bytes as text, in the largest binary unit in which the number is at least 1."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    unit = 0
    while count >= 1024 and unit < 4:
        count /= 1024
        unit += 1
    return f"{count:.4g} {units[unit]}"


def duration(seconds: float) -> str:
    """Returns a duration in its two largest units: 3 d 4 h, 12 min 5 s."""
    whole = max(0, round(seconds))
    parts = [
        (whole // 86400, "d"),
        (whole // 3600 % 24, "h"),
        (whole // 60 % 60, "min"),
        (whole % 60, "s"),
    ]
    # The first unit that is not 0, or the seconds if all are 0.
    first = len(parts) - 1
    for number, (count, _) in enumerate(parts):
        if count:
            first = number
            break
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2])


def check_space(out: Path, needed: int) -> None:
    """Raises InputError if the disk that will hold `out` has fewer than `needed` bytes free."""
    nearest = next(parent for parent in out.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(nearest).free
    if free < needed:
        raise InputError(
            f"out={out} needs {binary_size(needed)}, but {binary_size(free)} are free there"
        )


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `out` and renames it to `out` at the end.

    If an exception stops the work, the temporary folder is removed.

    Raises InputError if the temporary folder cannot be made. Turns an OSError of the work, which
    mostly comes from the disk, into a RunError.
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
        # A failing disk may fail here too. Only its first error is reported.
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise RunError(f"out={out} could not be written: {error.strerror or error}") from error
        raise
