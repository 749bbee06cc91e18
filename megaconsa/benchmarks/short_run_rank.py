"""One rank of a run that is only measured: no validation, checkpoints or logs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from megaconsa import config as configuration
from megaconsa.errors import InputError
from megaconsa.parallel.mesh import initialize
from megaconsa.parallel.world import join, leave
from megaconsa.training import failures
from megaconsa.training.inputs import check_inputs
from megaconsa.training.setup import build_trainer
from megaconsa.training.trainer import Trainer


def work_as_rank(
    config_path: Path, out: Path, overrides: list[str], work: Callable[[Trainer], None]
) -> None:
    """Builds the run on this rank and calls `work`, which may train and write.

    out: the result's file. The report of a failing rank goes beside it.

    Raises InputError on all ranks together. Ends the process after any other error.
    """
    config = configuration.load(config_path, overrides)
    world = join()
    try:
        inputs = check_inputs(config, world)
        mesh = initialize(config.parallel, world)
        work(build_trainer(inputs, mesh))
    except InputError:
        raise  # All ranks agreed on this refusal.
    except Exception as error:
        sys.exit(failures.end(error, out.parent, world, None))
    leave()
