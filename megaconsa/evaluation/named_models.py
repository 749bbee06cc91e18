"""Which models to evaluate: their labels and folders, checked without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megaconsa import run_folder
from megaconsa.errors import InputError


def named_models(named: Sequence[str]) -> list[tuple[str, Path]]:
    """Returns the label and the folder of each model.

    named: `LABEL=FOLDER`, or `FOLDER`, whose name is then the label.

    Raises InputError if a folder is not an export, or two models have the same label.
    """
    found: dict[str, Path] = {}
    for name in named:
        label, folder = _split(name)
        if label in found:
            raise InputError(
                f"two models are called {label}; "
                f"give each a label of its own, --model LABEL={folder}"
            )
        _check_exported(folder)
        found[label] = folder
    return list(found.items())


def _split(name: str) -> tuple[str, Path]:
    """Splits a --model argument into label and folder."""
    # The path of a folder may contain a "=" (runs/lr=0.1/hf), but a label contains no "/".
    label, equals, folder = name.partition("=")
    if not equals or "/" in label:
        return Path(name).resolve().name, Path(name)
    if not label or not folder:
        raise InputError(f"--model {name} is neither LABEL=FOLDER nor FOLDER")
    return label, Path(folder)


def _check_exported(folder: Path) -> None:
    """Raises InputError for a missing folder, a run and a checkpoint."""
    if not folder.is_dir():
        raise InputError(f"model {folder} is not there; give a folder that export-hf made")
    kinds = {"a run": folder / run_folder.CONFIG, "a checkpoint": folder / "state.json"}
    for kind, mark in kinds.items():
        if mark.is_file():
            raise InputError(
                f"{folder} is {kind}, not an exported model; "
                f"export it first: megaconsa export-hf {folder} --out FOLDER"
            )
