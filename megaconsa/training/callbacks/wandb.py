"""Logs to Weights & Biases, if it is installed and logging.wandb names a project.

WANDB_MODE=offline works. An error in W&B never ends a run. It is logged once, and nothing more is
sent to W&B until the next start.
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
from megaconsa.training.trainer import Callback, Order, Row, Trainer

logger = logging.getLogger(__name__)

LIMITS = {"init_timeout": 30, "finish_timeout": 60}
"""Seconds that training waits for a server that does not answer. Environment variables such as
WANDB_INIT_TIMEOUT override them."""


class WandB(Callback):
    order = Order.REPORT
    main_rank_only = True

    def __init__(self, project: str, run: Path, config: dict[str, Any]) -> None:
        self.project = project
        self.run = run
        self.config = config
        self.logged: Any = None
        """W&B's run. None before it starts and after an error."""

    def on_start(self, trainer: Trainer) -> None:
        self._guarded(self._begin)

    def on_step(self, trainer: Trainer, row: Row) -> None:
        if self.logged is not None:
            numbers = {name: value for name, value in row.items() if isinstance(value, int | float)}
            # W&B's own step can only grow, and rows for an earlier step are dropped. A run that
            # rewinds to a checkpoint would lose its new rows. So W&B counts steps by itself, and
            # `step` is the x-axis.
            self._guarded(lambda: self.logged.log(numbers))

    def on_finish(self, trainer: Trainer) -> None:
        if self.logged is not None:
            self._guarded(lambda: self.logged.finish())

    def _begin(self) -> None:
        import wandb

        known = wandb.Settings.model_fields  # Older versions lack some of these settings.
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
        """Does `work`. Stops logging to W&B if it fails."""
        try:
            work()
        # W&B raises its own exceptions and those of its connection. Its installation may be broken.
        except Exception as error:
            self.logged = None
            reason = " ".join(str(error).split()) or type(error).__name__
            logger.error(
                "logging.wandb=%s: W&B failed (%s); training continues, "
                "and nothing is logged there until the next start",
                self.project,
                reason,
            )


def _run_id(path: Path) -> str:
    """The ID in the file `path`, which is created if it does not exist.

    Raises OSError or ValueError if the file cannot be read, written or parsed.
    """
    if path.exists():
        return str(json.loads(path.read_text())["id"])
    # An ID made from the folder's name could be that of another run elsewhere, and could contain
    # characters that W&B refuses.
    chosen = uuid.uuid4().hex
    replace_text(path, json.dumps({"id": chosen}) + "\n")
    return chosen


@contextmanager
def _without_questions() -> Iterator[None]:
    """Hides the terminal from W&B.

    Without an API key, W&B asks for one on a terminal, and all ranks would wait for the answer.
    """
    terminal = sys.stdin
    with open(os.devnull) as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = terminal
