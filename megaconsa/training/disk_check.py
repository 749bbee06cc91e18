"""Check that the disk has room for the checkpoints that a run keeps."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

from megaconsa import run_folder
from megaconsa.checkpoint.writer import is_kept_for_ever
from megaconsa.config import CheckpointSection, Config
from megaconsa.errors import InputError
from megaconsa.files import binary_size
from megaconsa.model.flops import parameter_count
from megaconsa.planning.plan import CHECKPOINT_BYTES
from megaconsa.training.inputs import Inputs

logger = logging.getLogger(__name__)


def check_disk(inputs: Inputs) -> tuple[int, int]:
    """Checks the disk that holds the checkpoints.

    Returns its free bytes, and the bytes that the run's checkpoints still need.
    Raises InputError if these do not fit. Logs a warning if the checkpoints that are kept forever
    do not fit in addition.
    """
    config = inputs.config
    folder = config.run.dir / run_folder.CHECKPOINTS
    size = parameter_count(inputs.model_config).total * CHECKPOINT_BYTES
    done = 0
    held = 0
    if inputs.resume is not None:
        done = inputs.resume.step
        newest = inputs.found.index(inputs.resume.path)
        usable = inputs.found[newest : newest + config.checkpoint.keep]
        # Each of these is deleted once enough newer ones exist.
        held = sum(not is_kept_for_ever(path, config.checkpoint.keep_every) for path in usable)
    # A new checkpoint is complete before an old one is deleted.
    most = config.checkpoint.keep + 1
    more = min(most - held, _saves(config, done))
    needed = size * max(more, 1)
    # The folder may be a link to another disk, or may not exist yet.
    target = folder.resolve()
    nearest = next(path for path in (target, *target.parents) if path.is_dir())
    free = shutil.disk_usage(nearest).free + _reclaimed(folder)
    if free < needed:
        raise InputError(
            f"run.dir={config.run.dir} has {binary_size(free)} free for checkpoints on the disk of "
            f"{nearest}, but they need {binary_size(needed)} more: up to {most} of "
            f"{binary_size(size)} each, because checkpoint.keep={config.checkpoint.keep} stay "
            "until a new one is whole; make room, lower checkpoint.keep or choose another disk"
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
    """Upper bound of the number of checkpoints that the run writes after step `done`."""
    steps = config.training.steps
    every = config.checkpoint.every
    if config.checkpoint.minutes:
        # Saving by time writes at most one checkpoint per step.
        return steps - done
    if not every:
        return 1
    return math.ceil(steps / every) - done // every


def _kept_for_ever(section: CheckpointSection, done: int, steps: int) -> int:
    """The number of checkpoints after step `done` that `keep_every` will keep.

    It counts only checkpoints saved by steps. Checkpoints saved by time match only by chance.
    """
    if not (section.every and section.keep_every):
        return 0
    period = math.lcm(section.every, section.keep_every)
    return steps // period - done // period


def _reclaimed(folder: Path) -> int:
    """Bytes of the unfinished files of a killed run. They are freed when the run starts again."""
    return sum(path.stat().st_size for path in folder.glob(".step_*/*") if path.is_file())
