"""Writes provenance.json: what produced the run, one entry for each start."""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from megaconsa import provenance, run_folder
from megaconsa.errors import InputError
from megaconsa.training.trainer import Callback, Order, Trainer

logger = logging.getLogger(__name__)


class Provenance(Callback):
    order = Order.REPORT
    main_rank_only = True

    def __init__(self, run: Path, machines: Sequence[tuple[str, str]]) -> None:
        """machines: `machine` of each rank."""
        self.run = run
        self.machines = machines
        self.starts: list[provenance.Start] = []

    def on_start(self, trainer: Trainer) -> None:
        try:
            self.starts = provenance.load_starts(self.run)
        except InputError as error:
            logger.warning("%s; the record of earlier starts is lost", error)
        start = provenance.describe_start(trainer.progress.step, self.machines)
        self.starts.append(start)
        self._save()

    def on_finish(self, trainer: Trainer) -> None:
        if self.starts:
            self.starts[-1] = provenance.ended(self.starts[-1], trainer.progress.step)
            self._save()

    def _save(self) -> None:
        try:
            provenance.save_starts(self.run, self.starts)
        except OSError as error:
            path = self.run / run_folder.PROVENANCE
            logger.error("%s cannot be written: %s", path, error.strerror)


def machine(device: torch.device) -> tuple[str, str]:
    """Returns the names of this host and of the device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return platform.node(), name


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        field, _, value = line.partition(":")
        if field.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()
