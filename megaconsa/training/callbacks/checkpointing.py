"""Checkpoints every so many steps or minutes, at the end, and before a run stops on a signal; written while training goes on."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from megaconsa import incidents, run_folder
from megaconsa.checkpoint.writer import Result, Snapshot, Staging, Writer
from megaconsa.config import CheckpointSection
from megaconsa.consa.gates import GateBank
from megaconsa.errors import RunError, UnreachableError
from megaconsa.files import replace_text
from megaconsa.parallel.world import World
from megaconsa.training.callbacks.base import Callback, Row
from megaconsa.training.trainer import Stop, Trainer

logger = logging.getLogger(__name__)

LAST_WAIT_SECONDS = 60.0
"""For a write under way when an error ends the run: the others may be gone, and then it never ends."""
LONG_WAIT_SECONDS = 1.0
"""A wait for the write before that is worth a line in the log."""
FAILED_SAVES = 2
"""In a row, after which the run ends: what it trains from there on would be lost."""


class Checkpointing(Callback):
    def __init__(
        self, run: Path, section: CheckpointSection, world: World, description: dict[str, Any]
    ) -> None:
        """description: what state.json says beside the trainer's progress (configuration, shape, data)."""
        self.run, self.every, self.description = run, section.every, description
        self.seconds = 60 * section.minutes
        self.writer = Writer(
            run,
            section.keep,
            section.keep_every,
            world.rank,
            world.size,
            world.launch,
            world.exchange,
        )
        self.staging = Staging()
        self.longest_save: float | None = None
        """Seconds from the beginning of a save to its commit; None before the first has ended."""
        self.due = False
        """A save waits for a step that is applied."""
        self.failed = 0
        """Saves in a row that failed, of those whose end is known."""
        self.error: str | None = None
        """Of the last of them."""
        self._stall = 0.0
        self._saved_at = time.monotonic()

    def on_start(self, trainer: Trainer) -> None:
        self._saved_at = time.monotonic()
        if not (self.every or self.seconds):
            logger.warning(
                "no checkpoint before the last step: a lost node would lose the whole run; set checkpoint.minutes"
            )
        if trainer.mesh.is_main:
            self.writer.clean()

    def on_step(self, trainer: Trainer, row: Row) -> None:
        step = trainer.progress.step
        self._report(trainer, self.writer.poll())
        if trainer.stop is Stop.UNSAVED and step < trainer.training.steps:
            raise self._unsaved()
        last = self._is_last(trainer)
        by_steps = self.every > 0 and step % self.every == 0
        self.due = self.due or by_steps or trainer.saving
        # While steps are skipped the weights may be what is wrong: the checkpoints there are may be the last good ones.
        if last or (self.due and not trainer.progress.bad_steps.in_row):
            self.due = False
            self.save(trainer, row)
        elif (
            trainer.mesh.is_main
            and self.seconds
            and time.monotonic() - self._saved_at > self.seconds
        ):
            # Clocks of ranks differ: the main rank's decides, and the others hear of it with the next step.
            trainer.request_save()
        if last:
            result = self.writer.wait()
            if result is not None and result.error is not None:
                self._count(result)
                if self.failed >= FAILED_SAVES:
                    raise self._unsaved()
                raise RunError(
                    f"the checkpoint of step {step} could not be written: {result.error}; older ones in {self.run} are whole"
                )

    def on_finish(self, trainer: Trainer) -> None:
        self._report(trainer, self.writer.wait(LAST_WAIT_SECONDS))

    def save(self, trainer: Trainer, row: Row) -> None:
        """Copies the training state to host memory and begins to write it."""
        started = time.monotonic()
        self._saved_at = started
        if (before := self.writer.wait()) is not None:
            self._report(trainer, before)
            if (waited := time.monotonic() - started) > LONG_WAIT_SECONDS:
                logger.warning(
                    "step %d waited %.0f s until the checkpoint of step %d was written, which took %.0f s; raise checkpoint.every",
                    trainer.progress.step,
                    waited,
                    before.step,
                    before.seconds,
                )
        # All ranks have heard of the same saves here. The last one is tried even so.
        if self.failed >= FAILED_SAVES and not self._is_last(trainer):
            raise self._unsaved()
        engine, main = trainer.engine, trainer.mesh.is_main
        gates = trainer.gates if main else None
        weights, moments = self.staging.copy(engine.weights()), self.staging.copy(engine.moments())
        losses: Row = {name: row[name] for name in ("loss", "validation_loss") if name in row}
        state: dict[str, Any] = {
            **asdict(trainer.progress),
            **losses,
            "optimizer_steps": engine.optimizer_steps,
            **self.description,
        }
        snapshot = Snapshot(
            trainer.progress.step,
            weights,
            moments,
            _random_states(trainer.mesh.device),
            state if main else None,
            {name: value.detach().cpu().clone() for name, value in gates.state().items()}
            if gates
            else None,
            trainer.allocation if main else None,
        )
        self._stall = time.monotonic() - started
        self.writer.begin(snapshot, self._stall)
        if gates:
            try:
                _write_gates(self.run / run_folder.GATES, trainer.progress.step, gates)
            except OSError as error:
                logger.error(
                    "%s could not be written: %s", self.run / run_folder.GATES, error.strerror
                )

    def _is_last(self, trainer: Trainer) -> bool:
        """Whether this step is the last of the process, and is saved."""
        ends = trainer.progress.step == trainer.training.steps or trainer.stopping
        return ends and trainer.stop is not Stop.REWIND

    def _report(self, trainer: Trainer, result: Result | None) -> None:
        if result is None:
            return
        self._count(result)
        self.longest_save = max(self.longest_save or 0.0, self._stall + result.seconds)
        if self.failed >= FAILED_SAVES:
            # Ranks hear of the end of a write at different steps: they end together after the next.
            trainer.request_stop(Stop.UNSAVED)
        if result.error is not None and trainer.mesh.is_main:
            incidents.record(
                self.run,
                "checkpoint",
                f"it could not be written: {result.error}",
                step=result.step,
                rank=0,
            )
            logger.error(
                "the checkpoint of step %d could not be written: %s; older checkpoints are whole; %s",
                result.step,
                result.error,
                "training goes on, and ends if the next one fails too"
                if self.failed < FAILED_SAVES
                else "the run ends",
            )

    def _count(self, result: Result) -> None:
        self.failed = 0 if result.error is None else self.failed + 1
        self.error = result.error

    def _unsaved(self) -> UnreachableError:
        return UnreachableError(
            f"{FAILED_SAVES} checkpoints in a row could not be written ({self.error}); make room or mend "
            f"the disk of {self.run}, then run the same command: it goes on from the newest checkpoint"
        )


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def _write_gates(path: Path, step: int, gates: GateBank) -> None:
    """The newest gates and their evidence, for people and plots."""
    content = {"step": step} | gates.describe()
    replace_text(path, json.dumps(content))
