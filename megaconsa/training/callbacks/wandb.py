"""Weights & Biases, where it is installed and logging.wandb names a project. WANDB_MODE=offline works."""

from __future__ import annotations

from typing import Any

from megaconsa.training.callbacks.base import Callback, Row
from megaconsa.training.trainer import Trainer


class WandB(Callback):
    def __init__(self, project: str, name: str, config: dict[str, Any]) -> None:
        import wandb

        self.wandb, self.project, self.name, self.config = wandb, project, name, config

    def on_start(self, trainer: Trainer) -> None:
        self.wandb.init(project=self.project, name=self.name, id=self.name.replace("/", "-"), resume="allow", config=self.config)

    def on_step(self, trainer: Trainer, row: Row) -> None:
        self.wandb.log({name: value for name, value in row.items() if isinstance(value, int | float)}, step=row["step"])

    def on_finish(self, trainer: Trainer) -> None:
        self.wandb.finish()
