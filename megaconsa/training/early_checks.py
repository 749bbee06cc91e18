"""What is refused before torch is imported, which takes seconds.

`megaconsa.training.inputs` checks the same again, together with all else.
"""

from __future__ import annotations

from pathlib import Path

from megaconsa import run_folder
from megaconsa.config import Config
from megaconsa.data.mixture_file import read_info
from megaconsa.errors import InputError
from megaconsa.parallel.topology import Topology
from megaconsa.remote_path import is_remote


def check_early(config: Config) -> None:
    """Raises InputError where one process cannot train the configuration, or finds no data.

    Data in an object store are left to the check of all inputs.
    """
    Topology.of(config, 1)
    if not is_remote(config.data.path):
        read_info(config.data.path)


def check_run_folder(run: Path) -> None:
    """Raises InputError if `run` holds no configuration of a run."""
    if not (run / run_folder.CONFIG).is_file():
        raise InputError(
            f"{run} is not a run folder: it holds no {run_folder.CONFIG}; give a run's run.dir"
        )
