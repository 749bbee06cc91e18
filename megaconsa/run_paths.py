"""Paths in a run's own files: config.yaml and the configuration in state.json.

They are written as absolute paths, so that they do not depend on the working directory. A run may
be moved together with the files that it names. These keep their place relative to the run folder,
and are found there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megaconsa import run_folder
from megaconsa.remote_path import is_remote

PATHS = (
    ("run", "dir"),
    ("model", "init_from"),
    ("allocation", "file"),
    ("data", "path"),
    ("data", "cache"),
)
"""Section and field of every path in a configuration."""


def absolute(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a configuration's plain values with absolute paths.

    Relative paths start at the working directory.
    """
    return _with_paths(config, os.path.abspath)


def resolved(config: dict[str, Any]) -> dict[str, Any]:
    """Like `absolute`, but follows links. So two spellings of one place become equal."""
    return _with_paths(config, os.path.realpath)


def relocated(config: dict[str, Any], run: Path) -> dict[str, Any]:
    """A copy of the configuration that a run wrote, with its paths updated to the run's new place.

    A path stays as it is if it still exists, or if nothing exists at its new place. Relative paths,
    which earlier versions wrote, stay too.

    run: the folder where the run is now.
    """
    old = _run_dir(config)
    new = os.path.abspath(run)
    if old is None or not os.path.isabs(old) or old == new:
        return config

    def moved(path: str) -> str:
        if path == old:
            return new
        candidate = os.path.normpath(os.path.join(new, os.path.relpath(path, old)))
        if not os.path.isabs(path) or os.path.exists(path) or not os.path.exists(candidate):
            return path
        return candidate

    return _with_paths(config, moved)


def has_moved_to(folder: Path, config: dict[str, Any]) -> bool:
    """Whether `folder` holds a run that wrote this configuration when it was elsewhere.

    A copy does not count as moved while the original is still there.
    """
    old = _run_dir(config)
    is_run = (folder / run_folder.METRICS).is_file() and (folder / run_folder.CHECKPOINTS).is_dir()
    return (
        is_run
        and old is not None
        and os.path.isabs(old)
        and not os.path.exists(f"{old}/config.yaml")
    )


def shown(path: str) -> str:
    """A recorded path for people: relative if it is below the working directory.

    Tables and model cards use it. They are published and need not reveal paths of this machine.
    """
    inside = os.path.relpath(path)
    return path if inside.startswith("..") else inside


def _run_dir(config: object) -> str | None:
    """The value of run.dir. None if `config` is not a configuration."""
    section = config.get("run") if isinstance(config, dict) else None
    folder = section.get("dir") if isinstance(section, dict) else None
    return folder if isinstance(folder, str) else None


def _with_paths(config: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """A copy of the configuration with `change` applied to each path on a disk."""
    changed = dict(config)
    for section, field in PATHS:
        fields = changed.get(section)
        if not isinstance(fields, dict):
            continue
        path = fields.get(field)
        if isinstance(path, str) and not is_remote(path):
            changed[section] = fields | {field: change(path)}
    return changed
