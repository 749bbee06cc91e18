"""Which batches a run passes over after a spike: RUN/rewinds.json.

A list of {"step", "sequences"}: in this step there was a spike, and its batch ended at this place in the data order. A run that goes
on from a checkpoint before that step goes on from that place, every time it does: its data order is a function of seed, step and this
list.
"""

from __future__ import annotations

import json
from pathlib import Path

from megaconsa import run_folder
from megaconsa.errors import InputError
from megaconsa.files import replace_text
from megaconsa.reading import read_text
from megaconsa.training.callbacks.base import Callback, Row
from megaconsa.training.trainer import Stop, Trainer


class Rewinds(Callback):
    """Notes the spike for which the run goes back. On the main rank."""

    def __init__(self, run: Path) -> None:
        self.run = run

    def on_step(self, trainer: Trainer, row: Row) -> None:
        if trainer.stop is Stop.REWIND:
            found = [
                *_read(self.run),
                {"step": row["step"], "sequences": trainer.progress.sequences},
            ]
            replace_text(self.run / run_folder.REWINDS, json.dumps(found, indent=1) + "\n")


def rewound(run: Path, step: int, sequences: int) -> tuple[int, int]:
    """Where in the data order a run goes on that has done `step` steps and taken `sequences` sequences, and how often it went back for a
    later spike. InputError where the list is damaged: the run would train on what it was to pass over."""
    ahead = [entry["sequences"] for entry in _read(run) if entry["step"] > step]
    return max([sequences, *ahead]), len(ahead)


def _read(run: Path) -> list[dict[str, int]]:
    path = run / run_folder.REWINDS
    try:
        return [
            {name: int(entry[name]) for name in ("step", "sequences")}
            for entry in json.loads(read_text(path))
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"{path} cannot be read as a list of steps and sequences; restore it, or remove it to pass over nothing"
        ) from None
