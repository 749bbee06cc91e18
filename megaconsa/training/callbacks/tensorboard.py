"""Logs to TensorBoard: a step's numbers in groups, gates as a picture, samples, settings."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import yaml
from torch.utils.tensorboard import SummaryWriter

from megaconsa.config import Config
from megaconsa.reporting import gate_plots
from megaconsa.reporting.plot_style import style, to_pixels
from megaconsa.training.trainer import Callback, Order, Row, Trainer

if TYPE_CHECKING:
    from megaconsa.training.callbacks.samples import Samples

logger = logging.getLogger(__name__)

PICTURE_EVERY = 50
"""Steps between two pictures of the gates."""
GROUPS = {
    "loss": ("loss", "validation_loss"),
    "optimizer": ("learning_rate", "grad_norm", "gate_grad_norm", "skipped"),
    "progress": ("tokens", "sequences"),
    "speed": ("tokens_per_second", "mfu", "step_seconds", "data_seconds"),
    "ranks": ("rank_seconds", "slowest_rank", "slowest_rank_seconds"),
    "memory": ("memory_gib", "largest_memory_gib"),
    "sparsity": (
        *("target_sparsity", "expected_sparsity", "sampled_sparsity", "binarized_sparsity"),
        *("threshold_sparsity", "penalty"),
    ),
    "evidence": (
        *("split_agreement", "time_agreement", "separated_share", "decided_share", "cut_margin"),
    ),
}
"""TensorBoard shows the fields of a group together."""


class TensorBoard(Callback):
    order = Order.REPORT
    main_rank_only = True

    def __init__(self, config: Config, samples: Samples | None = None) -> None:
        self.folder = config.run.dir / "tensorboard"
        self.config = config
        self.samples = samples
        self.writer: SummaryWriter | None = None

    def on_start(self, trainer: Trainer) -> None:
        # purge_step hides what an interrupted run wrote after the checkpoint that it resumes from.
        try:
            writer = SummaryWriter(str(self.folder), purge_step=trainer.progress.step + 1)
            writer.add_text("settings", _settings(self.config), trainer.progress.step + 1)
            self.writer = writer
        except OSError as error:
            logger.error(
                "TensorBoard cannot write to %s: %s; training continues without it",
                self.folder,
                error.strerror,
            )

    def on_step(self, trainer: Trainer, row: Row) -> None:
        if self.writer is None:
            return
        try:
            self._write(self.writer, trainer, row)
        except OSError as error:  # The writer's thread met it some steps ago.
            logger.error(
                "TensorBoard's events cannot be written: %s; there are none from here on",
                error.strerror,
            )
            self.writer = None

    def _write(self, writer: SummaryWriter, trainer: Trainer, row: Row) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                writer.add_scalar(tag(name), value, row["step"])
        step = row["step"]
        if self.samples is not None and self.samples.validation.is_due(trainer):
            for number, sample in enumerate(self.samples.newest, 1):
                text = _as_it_is(f"{sample.prompt}{sample.text}")
                writer.add_text(f"samples/{number}", text, step)
        is_last = step == trainer.training.steps
        if trainer.gates and (step % PICTURE_EVERY == 0 or is_last):
            probability = trainer.gates.gates.open_probability.tolist()
            window = self.config.attention.window
            with style():
                drawing = gate_plots.allocation_maps(probability, step, None, "", window)
                pixels = to_pixels(drawing.figure)
            writer.add_image("gates/probability_full", pixels, step, dataformats="HWC")

    def on_finish(self, trainer: Trainer) -> None:
        if self.writer is not None:
            try:
                self.writer.close()
            except OSError as error:
                logger.error("TensorBoard's last events could not be written: %s", error.strerror)


def tag(field: str) -> str:
    """Returns the name of a field in TensorBoard: its group and itself."""
    for group, fields in GROUPS.items():
        if field in fields:
            return f"{group}/{field}"
    # The loss on a source of a mixture.
    group = "loss" if field.startswith("validation_loss_") else "other"
    return f"{group}/{field}"


def _settings(config: Config) -> str:
    """Returns the configuration as Markdown."""
    return _as_it_is(yaml.safe_dump(config.to_dict(), sort_keys=False))


def _as_it_is(text: str) -> str:
    """Returns Markdown that shows the text unchanged. Four spaces mark code."""
    return "\n".join(f"    {line}" for line in text.splitlines())
