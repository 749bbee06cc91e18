"""Whether the disk of a run's checkpoints has room for those that the run keeps."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

from megaconsa import run_folder
from megaconsa.config import CheckpointSection, Config
from megaconsa.errors import InputError
from megaconsa.files import binary_size
from megaconsa.model.flops import parameter_count
from megaconsa.training.inputs import Inputs

logger = logging.getLogger(__name__)

BYTES_A_PARAMETER = 12
"""Of a checkpoint: fp32 weights and two moments."""


def check_disk(inputs: Inputs) -> tuple[int, int]:
    """Free bytes on the disk of the checkpoints, and those that its checkpoints still need.

    A new checkpoint is whole before an old one goes, so at the most there are checkpoint.keep + 1.
    Raises InputError where they find no room; warns where those that stay for ever find none.
    """
    config = inputs.config
    folder = config.run.dir / run_folder.CHECKPOINTS
    size = parameter_count(inputs.shape).total * BYTES_A_PARAMETER
    done = 0 if inputs.resume is None else inputs.resume.step
    held = (
        0 if inputs.resume is None else len(inputs.found) - inputs.found.index(inputs.resume.path)
    )
    more = min(config.checkpoint.keep + 1 - held, _saves(config, done))
    needed = size * max(more, 1)
    # The folder may be a link to another disk, or not exist yet.
    target = folder.resolve()
    nearest = next(path for path in (target, *target.parents) if path.is_dir())
    free = shutil.disk_usage(nearest).free + _reclaimed(folder)
    if free < needed:
        most = config.checkpoint.keep + 1
        raise InputError(
            f"run.dir={config.run.dir} has {binary_size(free)} free for checkpoints on the disk of "
            f"{nearest}, but they need {binary_size(needed)} more: up to {most} of "
            f"{binary_size(size)} each, because checkpoint.keep={config.checkpoint.keep} stay until a "
            "new one is whole; make room, lower checkpoint.keep or choose another disk"
        )
    kept = _kept_for_ever(config.checkpoint, done, config.training.steps)
    if free < needed + size * kept:
        logger.warning(
            "checkpoint.keep_every=%d keeps %d more checkpoints of %s, but %s has %s free; "
            "move some elsewhere in time, or the run will fail to save",
            config.checkpoint.keep_every,
            kept,
            binary_size(size),
            nearest,
            binary_size(free),
        )
    return free, needed


def _saves(config: Config, done: int) -> int:
    """Upper bound of the checkpoints that the run writes from step `done` on."""
    steps = config.training.steps
    every = config.checkpoint.every
    if config.checkpoint.minutes:
        return steps - done
    if not every:
        return 1
    return math.ceil(steps / every) - done // every


def _kept_for_ever(section: CheckpointSection, done: int, steps: int) -> int:
    """Checkpoints by steps that `keep_every` will keep. Those by the clock meet it by chance."""
    if not (section.every and section.keep_every):
        return 0
    period = math.lcm(section.every, section.keep_every)
    return steps // period - done // period


def _reclaimed(folder: Path) -> int:
    """Bytes of what a killed run was writing or removing: they are free once the run starts."""
    return sum(path.stat().st_size for path in folder.glob(".step_*/*") if path.is_file())
