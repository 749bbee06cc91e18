"""Checkpoints every so many steps, at the end, and before a run stops on a signal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from megaconsa.checkpoint import store
from megaconsa.consa import hard_concrete
from megaconsa.consa.gates import GateBank
from megaconsa.files import replace_text
from megaconsa.training.callbacks.base import Callback, Row
from megaconsa.training.trainer import Trainer


class Checkpointing(Callback):
    def __init__(self, run: Path, every: int, keep: int, description: dict[str, Any]) -> None:
        """description: what state.json says beside the trainer's progress (configuration, shape, data)."""
        self.run, self.every, self.keep, self.description = run, every, keep, description

    def on_step(self, trainer: Trainer, row: Row) -> None:
        step = trainer.progress.step
        if (self.every and step % self.every == 0) or step == trainer.training.steps or trainer.stopping:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        main = trainer.mesh.is_main
        # Gathering the shards takes part of every rank; writing is the main one's.
        weights, moments = _collect(trainer.engine.weights(), main), _collect(trainer.engine.moments(), main)
        if not main:
            return
        state = {**asdict(trainer.progress), "optimizer_steps": trainer.engine.optimizer_steps, **self.description}
        store.save(
            self.run,
            state,
            weights=weights,
            moments=moments,
            gates=trainer.gates.state() if trainer.gates else None,
            allocation=trainer.allocation,
            keep=self.keep,
        )
        if trainer.gates:
            _write_gates(self.run / "gates.json", trainer.progress.step, trainer.gates)


def _collect(tensors: Iterator[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Runs through all of them, keeping them only where asked: other ranks need no copy of the model in host memory."""
    return {name: value for name, value in tensors if keep}


def _write_gates(path: Path, step: int, gates: GateBank) -> None:
    """The newest gates for people and plots: log_alpha and P(z > 0), layers x units."""
    log_alpha = gates.log_alpha.detach().cpu()
    probability = hard_concrete.probability_nonzero(log_alpha)
    content = {"step": step, "log_alpha": log_alpha.tolist(), "probability_full": probability.tolist()}
    replace_text(path, json.dumps(content))
