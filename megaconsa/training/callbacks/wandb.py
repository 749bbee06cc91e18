"""Weights & Biases, where it is installed and logging.wandb names a project. WANDB_MODE=offline works.

Whatever goes wrong there ends no run: it is one error in the log, and nothing is logged there from then on.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megaconsa import run_folder
from megaconsa.files import replace_text
from megaconsa.training.callbacks.base import Callback, Row
from megaconsa.training.trainer import Trainer

logger = logging.getLogger(__name__)

LIMITS = {"init_timeout": 30, "finish_timeout": 60}
"""Seconds that training waits for a server that does not answer. Environment variables such as
WANDB_INIT_TIMEOUT override them."""


class WandB(Callback):
    def __init__(self, project: str, run: Path, config: dict[str, Any]) -> None:
        self.project = project
        self.run = run
        self.config = config
        self.logged: Any = None
        """W&B's run; None before it began and after an error."""

    def on_start(self, trainer: Trainer) -> None:
        self._guarded(self._begin)

    def on_step(self, trainer: Trainer, row: Row) -> None:
        if self.logged is not None:
            numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
            # W&B's own step only grows, and rows of an earlier one are dropped: a run that goes back to a
            # checkpoint would lose its new rows. So it counts for itself, and `step` is the x-axis.
            self._guarded(lambda: self.logged.log(numbers))

    def on_finish(self, trainer: Trainer) -> None:
        if self.logged is not None:
            self._guarded(lambda: self.logged.finish())

    def _begin(self) -> None:
        import wandb

        known = wandb.Settings.model_fields  # older versions lack some
        limits = {
            name: seconds
            for name, seconds in LIMITS.items()
            if name in known and f"WANDB_{name.upper()}" not in os.environ
        }
        with _without_questions():
            self.logged = wandb.init(
                project=self.project,
                name=str(self.run),
                id=_run_id(self.run / run_folder.WANDB),
                resume="allow",
                dir=self.run,
                config=self.config,
                settings=wandb.Settings(**limits),
            )
        self.logged.define_metric("*", step_metric="step")

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # its own kinds, those of its connection, a broken installation
            self.logged = None
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.error(
                "logging.wandb=%s: W&B failed (%s); training goes on, and nothing is logged there until the next start",
                self.project,
                reason,
            )


def _run_id(path: Path) -> str:
    """The ID in `path`, which is made where there is none. Raises OSError and ValueError."""
    if path.exists():
        return str(json.loads(path.read_text())["id"])
    # A name made from the folder's would be that of another run elsewhere, and hold what W&B refuses.
    chosen = uuid.uuid4().hex
    replace_text(path, json.dumps({"id": chosen}) + "\n")
    return chosen


@contextmanager
def _without_questions() -> Iterator[None]:
    """Without a key W&B asks a terminal for it, and all ranks would wait for the answer."""
    terminal = sys.stdin
    with open(os.devnull) as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = terminal
