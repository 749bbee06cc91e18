"""metrics.jsonl: one JSON object a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO

from megaconsa.files import replace_text
from megaconsa.training.callbacks.base import Callback, Row
from megaconsa.training.trainer import Trainer

NAME = "metrics.jsonl"


class MetricsFile(Callback):
    def __init__(self, run: Path) -> None:
        self.path = run / NAME
        self.file: IO[str] | None = None

    def on_start(self, trainer: Trainer) -> None:
        truncate(self.path, trainer.progress.step)
        self.file = self.path.open("a", buffering=1)

    def on_step(self, trainer: Trainer, row: Row) -> None:
        assert self.file is not None
        self.file.write(json.dumps(row) + "\n")

    def on_finish(self, trainer: Trainer) -> None:
        if self.file is not None:
            self.file.close()


def truncate(path: Path, last_step: int) -> None:
    """Drops rows past `last_step` and a torn last line, so that each step stands once."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            break
    replace_text(path, "".join(line + "\n" for line in kept))
