"""The record of a study's settings in its folder.

It prevents results of different settings from being mixed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from megaconsa import run_folder
from megaconsa.config import differences
from megaconsa.errors import InputError
from megaconsa.files import parse_json, replace_text
from megaconsa.study.runs import Runs
from megaconsa.training.same_run import check_same_run

FILE = "study.json"
GROWING = {"sparsities", "seeds", "draws"}
"""Fields that only say which trials there are. They may change."""


def check(runs: Runs) -> None:
    """Raises InputError if the study has changed its settings since the folder was begun.

    New arms are not a change.
    """
    _check_start(runs)
    path = runs.out / FILE
    if not path.exists():
        return
    old = _read(path)
    new = _content(runs)
    for name, arm in new["arms"].items():
        known = old["arms"].get(name, arm)
        changed = differences(known, arm)
        if changed:
            raise InputError(
                f"arms.{name} has changed since {runs.out} was begun ({'; '.join(changed)}); "
                "give the new one another name, or choose another --out"
            )
    for part in ("study", "config"):
        changed = differences(old[part], new[part])
        if changed:
            fields = "; ".join(changed)
            raise InputError(
                f"the study of {runs.out} has changed ({fields}); choose another --out"
            )


def _check_start(runs: Runs) -> None:
    """Raises InputError if the start was trained with other settings, for example by hand."""
    path = runs.start / run_folder.CONFIG
    if path.is_file():
        check_same_run(runs.start_config, yaml.safe_load(path.read_text()))


def save(runs: Runs) -> None:
    """Writes the settings. Arms that are no longer in the study stay on record."""
    path = runs.out / FILE
    content = _content(runs)
    old = None
    if path.exists():
        old = _read(path)
        content["arms"] = old["arms"] | content["arms"]
    # The tasks of an array find the file as the start left it. They must not all write at once.
    if content != old:
        replace_text(path, json.dumps(content, indent=1) + "\n")


def _content(runs: Runs) -> dict[str, Any]:
    arms = {}
    for name, arm in runs.study.arms.items():
        arms[name] = arm.model_dump(mode="json", exclude=GROWING)
    return {
        "study": runs.study.model_dump(mode="json", exclude=GROWING | {"arms", "config"}),
        "config": runs.start_config.to_dict(),
        "arms": arms,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = parse_json(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}; choose another --out") from None
    return content
