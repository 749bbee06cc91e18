"""Filling a data folder: locked while it is filled, complete or empty afterwards."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megaconsa.console import console
from megaconsa.data import PIECES, TOKENIZER
from megaconsa.data.dataset_info import INFO, TRAIN, UNFINISHED, VALIDATION, DatasetInfo
from megaconsa.errors import InputError


@contextmanager
def preparation(folder: Path, *, keeps_pieces: bool) -> Iterator[None]:
    """Context that locks `folder` while it is filled, and empties it again on failure.

    keeps_pieces: whether tokenized pieces stay on failure, so that the same command continues.

    Everything else that an earlier preparation left is removed. `finish` must be the last call
    inside. Raises InputError, with nothing touched, where the folder holds anything else, or
    where another process is preparing it.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder}: it is a file, name a new folder")
    existed = folder.is_dir()
    entries = {entry.name for entry in folder.iterdir()} if existed else set()
    others = entries - {UNFINISHED, PIECES, TOKENIZER, TRAIN, VALIDATION}
    # Our names alone do not make the folder ours: the marker must be there too.
    if entries and (UNFINISHED not in entries or others):
        foreign = min(others or entries)
        raise InputError(
            f"--out {folder}: the folder already holds other files ({foreign}), "
            "name a new or empty one"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / UNFINISHED).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"--out {folder}: another process is preparing it, "
                "wait for it or name another folder"
            ) from error
        # The other process may have finished between our first look and the lock.
        if (folder / INFO).exists():
            (folder / UNFINISHED).unlink(missing_ok=True)
            raise InputError(
                f"--out {folder}: another process has just finished it, nothing is left to do"
            )
        _clear(folder)
        try:
            yield
        except BaseException:
            _clear(folder)
            pieces = len(list((folder / PIECES).glob("*.json")))
            if pieces and keeps_pieces:
                console.print(
                    f"{pieces} tokenized pieces stay in {folder}; the same command continues",
                    markup=False,
                )
                raise
            shutil.rmtree(folder / PIECES, ignore_errors=True)
            (folder / UNFINISHED).unlink(missing_ok=True)
            if not existed:
                folder.rmdir()
            raise
        shutil.rmtree(folder / PIECES, ignore_errors=True)


def finish(folder: Path, info: DatasetInfo) -> None:
    """Ends a preparation by writing dataset.json atomically."""
    with (folder / UNFINISHED).open("w") as file:
        file.write(info.model_dump_json(indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / UNFINISHED, folder / INFO)


def _clear(folder: Path) -> None:
    """Removes everything that a preparation writes, except the marker and tokenized pieces."""
    for name in (TOKENIZER, TRAIN, VALIDATION):
        shutil.rmtree(folder / name, ignore_errors=True)
