"""Which batches a run skips after a spike, as recorded in RUN/rewinds.json.

The file is a list of {"step", "sequences"}. An entry says that this step had a spike, and that its
batch ended at this position in the data order. A run that resumes from a checkpoint before that
step continues at that position, every time it resumes. So its data order is a function of the seed,
the step and this list.
"""

from __future__ import annotations

import json
from pathlib import Path

from megaconsa import run_folder
from megaconsa.errors import InputError
from megaconsa.files import replace_text
from megaconsa.reading import read_text
from megaconsa.training.trainer import Callback, Order, Row, Stop, Trainer


class Rewinds(Callback):
    """Records the spike that makes the run rewind. Runs on the main rank only."""

    order = Order.REPORT
    main_rank_only = True

    def __init__(self, run: Path) -> None:
        self.run = run

    def on_step(self, trainer: Trainer, row: Row) -> None:
        if trainer.stop is Stop.REWIND:
            entry = {"step": row["step"], "sequences": trainer.progress.sequences}
            found = [*read_rewinds(self.run), entry]
            replace_text(self.run / run_folder.REWINDS, json.dumps(found, indent=1) + "\n")


def rewound(run: Path, step: int, sequences: int) -> tuple[int, int]:
    """Where in the data order a run resumes, given the spikes it has rewound for.

    step: steps done at the checkpoint.
    sequences: sequences taken at the checkpoint.
    Returns the position in the data order, in sequences, and the number of rewinds for later
    spikes.
    Raises InputError if the list is damaged, because the run would train on what it must skip.
    """
    ahead = [entry["sequences"] for entry in read_rewinds(run) if entry["step"] > step]
    return max([sequences, *ahead]), len(ahead)


def read_rewinds(run: Path) -> list[dict[str, int]]:
    """The entries of the list, oldest first, or none if there is no list.

    Raises InputError if the list is damaged.
    """
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
            f"{path} cannot be read as a list of steps and sequences; "
            "restore it, or remove it to pass over nothing"
        ) from None
