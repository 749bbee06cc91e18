"""Checkpoints in an object store: copies of those of a run, and fetching them back.

A copy is verified by reading it back. Its manifest is written last, so a copy without one is
unfinished.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from megaconsa import run_folder
from megaconsa.checkpoint import store
from megaconsa.checkpoint.store import MANIFEST, checksum
from megaconsa.errors import DataError, InputError, UnreachableError
from megaconsa.files import is_bare_name, parse_json, replace_text
from megaconsa.object_store import ObjectStore
from megaconsa.reading import patiently
from megaconsa.remote_path import RemotePath, is_remote

ATTEMPTS = 5
"""How often a file is uploaded before its store counts as out of reach."""


def upload(path: Path, remote: str) -> None:
    """Copies a checkpoint into a store and verifies the copy.

    path: the checkpoint's folder.
    remote: the folder of the run in the store, such as s3://bucket/runs/one.

    Raises UnreachableError where the store stays out of reach. Raises DataError where a copy is not
    what was written. Raises InputError where a package or credentials are missing.
    """
    from streaming.base.storage.upload import CloudUploader

    checkpoint = store.read(path)
    target = f"{remote.rstrip('/')}/{path.name}"
    with checkpoint.in_use():
        try:
            uploader = CloudUploader.get(
                (str(path), target), keep_local=True, retry=ATTEMPTS, exist_ok=True
            )
            with tempfile.TemporaryDirectory(prefix="megaconsa-upload-") as folder:
                for name, recorded in checkpoint.manifest["files"].items():
                    uploader.upload_file(name)
                    copy = Path(folder) / name
                    _download(f"{target}/{name}", copy)
                    _check(copy, recorded, f"{target}/{name}")
                    copy.unlink()
            uploader.upload_file(MANIFEST)
        except (DataError, InputError, UnreachableError):
            raise
        except Exception as error:
            # Each store has its own exceptions.
            raise UnreachableError(f"{target}: cannot be written ({error!r})") from error


def fetch(remote: str, run: Path, advance: Callable[[int], None] = lambda count: None) -> Path:
    """Copies a checkpoint from a store into a run folder and verifies it. Returns its folder.

    remote: the checkpoint in the store, such as s3://bucket/runs/one/step_1000.
    advance: is called with the number of bytes of each file.

    Raises InputError where the run has that checkpoint or the store does not. Raises DataError
    where a file is not what was written.
    """
    name = remote.rstrip("/").rsplit("/", 1)[-1]
    folder = run / run_folder.CHECKPOINTS
    final = folder / name
    if not store.is_name(name):
        raise InputError(f"{remote} is no checkpoint; give a folder such as .../step_1000")
    if final.exists():
        raise InputError(f"{final} exists; name another run folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetching-", dir=folder) as temporary:
        begun = Path(temporary) / name
        begun.mkdir()
        manifest = begun / MANIFEST
        try:
            _download(f"{remote}/{MANIFEST}", manifest)
            files = parse_json(manifest.read_text())["files"]
        except (UnreachableError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{remote}: holds no whole checkpoint ({error}); give another one"
            ) from error
        for file, recorded in files.items():
            if not is_bare_name(file):
                raise InputError(f"{remote}: names {file!r}, which is no file of its folder")
            _download(f"{remote}/{file}", begun / file)
            _check(begun / file, recorded, f"{remote}/{file}")
            advance(int(recorded["bytes"]))
        os.replace(begun, final)
    return final


class Uploads:
    """Which checkpoints of a run have verified copies."""

    def __init__(self, run: Path, remote: str) -> None:
        self._run = run
        self._remote = remote
        self._file = run / run_folder.UPLOADS

    def pending(self, is_kept_for_ever: Callable[[Path], bool]) -> list[Path]:
        """The newest checkpoint and those kept for ever, unless they are copied. Oldest first."""
        copied = self._read()
        paths = store.committed(self._run)
        wanted = [path for path in paths if path == paths[0] or is_kept_for_ever(path)]
        return [path for path in reversed(wanted) if copied.get(path.name) != _mark(path)]

    def add(self, path: Path) -> None:
        """Records a verified copy."""
        copied = {**self._read(), path.name: _mark(path)}
        content = {"remote": self._remote, "checkpoints": copied}
        replace_text(self._file, json.dumps(content, indent=2) + "\n")

    def _read(self) -> dict[str, str]:
        """The mark of each copied checkpoint, by name."""
        if not self._file.exists():
            return {}
        content = parse_json(self._file.read_text())
        if content["remote"] != self._remote:
            return {}
        return dict(content["checkpoints"])


def _mark(path: Path) -> str:
    """What tells a checkpoint from another one of the same step."""
    return checksum(path / MANIFEST)


def _download(remote: str, local: Path) -> None:
    """Copies a file from a store. Raises UnreachableError where that fails."""
    try:
        if is_remote(remote):
            address = RemotePath(remote)
            objects = ObjectStore(address.scheme)
            patiently(lambda: objects.download(address, local), address)
        else:
            shutil.copyfile(remote, local)
    except OSError as error:
        raise UnreachableError(f"{remote}: cannot be read ({error.strerror})") from error


def _check(copy: Path, recorded: dict[str, object], remote: str) -> None:
    """Raises DataError where a file is not what the manifest says."""
    size = copy.stat().st_size
    if size != recorded["bytes"]:
        raise DataError(f"{remote} has {size} bytes instead of {recorded['bytes']}")
    if checksum(copy) != recorded["xxh3_64"]:
        raise DataError(f"{remote} does not match its checksum")
