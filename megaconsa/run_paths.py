"""Paths in a run's own files: config.yaml and the configuration in state.json.

They are written absolute, so that they mean the same from any working directory. A run may be moved
together with what it names. Then all of it keeps its place relative to the run folder, and is found
there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megaconsa import run_folder

PATHS = (("run", "dir"), ("model", "init_from"), ("allocation", "file"), ("data", "path"))
"""Section and field of every path in a configuration."""


def absolute(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a configuration's plain values, with paths made absolute from the working directory."""
    return _with_paths(config, os.path.abspath)


def resolved(config: dict[str, Any]) -> dict[str, Any]:
    """As `absolute`, with links followed: equal where two spellings name one place."""
    return _with_paths(config, os.path.realpath)


def relocated(config: dict[str, Any], run: Path) -> dict[str, Any]:
    """A copy of what a run wrote, with the paths as they are now that the run lies in `run`.

    A path that still exists stays, and so does one that is not where the run went. Relative ones, of
    earlier versions, stay too.
    """
    old = _run_dir(config)
    new = os.path.abspath(run)
    if old is None or not os.path.isabs(old) or old == new:
        return config

    def moved(path: str) -> str:
        if path == old:
            return new
        candidate = os.path.normpath(os.path.join(new, os.path.relpath(path, old)))
        stays = not os.path.isabs(path) or os.path.exists(path) or not os.path.exists(candidate)
        return path if stays else candidate

    return _with_paths(config, moved)


def has_moved_to(folder: Path, config: dict[str, Any]) -> bool:
    """Whether `folder` holds a run that wrote this configuration when it lay elsewhere.

    A copy of a run that is still there has not moved.
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
    """A recorded path as people name it: relative where it lies below the working directory.

    For tables and model cards, which are published and need not tell of this machine.
    """
    inside = os.path.relpath(path)
    return path if inside.startswith("..") else inside


def _run_dir(config: object) -> str | None:
    """run.dir of what may be no configuration at all."""
    section = config.get("run") if isinstance(config, dict) else None
    folder = section.get("dir") if isinstance(section, dict) else None
    return folder if isinstance(folder, str) else None


def _with_paths(config: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    changed = dict(config)
    for section, field in PATHS:
        fields = changed.get(section)
        if isinstance(fields, dict) and isinstance(fields.get(field), str):
            changed[section] = fields | {field: change(fields[field])}
    return changed
