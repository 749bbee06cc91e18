"""Stops a run in this process after a given step, as a signal or a crash would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megaconsa.checkpoint import store
from megaconsa.config import build
from megaconsa.parallel import mesh
from megaconsa.training.inputs import check_inputs
from megaconsa.training.setup import build_trainer
from megaconsa.training.trainer import Callback, Row, Trainer

RULE = {"source": "rule", "rule": "head-share", "sparsity": 0.5}
"""An allocation for stage 2."""


class StopAfter(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer: Trainer, row: Row) -> None:
        if row["step"] == self.step - 1:
            trainer.request_stop()  # as a signal during the step before would


class CrashAfter(StopAfter):
    def on_step(self, trainer: Trainer, row: Row) -> None:
        if row["step"] == self.step:
            raise KeyboardInterrupt


def interrupted(values: dict[str, Any], callback: Callback) -> None:
    trainer = build_trainer(check_inputs(build(values)), mesh.initialize())
    trainer.callbacks = [*trainer.callbacks, callback]
    if isinstance(callback, CrashAfter):
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    else:
        assert not trainer.run()


def contents(run: str | Path) -> dict[str, bytes]:
    """The tensors of the newest checkpoint, as the bytes of their files."""
    newest = store.newest(Path(run))
    assert newest is not None
    return {path.name: path.read_bytes() for path in newest.path.glob("*.safetensors")}
