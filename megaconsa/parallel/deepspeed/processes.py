"""DeepSpeed's part in starting a process: its backend and its grid of ranks."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megaconsa.parallel.process_groups import ProcessGroups
from megaconsa.parallel.world import World


def start_deepspeed(world: World) -> None:
    """Makes DeepSpeed use the process group that this process has joined."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if world.device.type == "cpu":
        # DeepSpeed would compile this operator for more than a minute at start-up. It only speeds
        # up all-reduces, which are not the bottleneck of a run on a CPU.
        __compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed uses the existing process group. We do not let it create one, because it does not
    # tell NCCL which device to use.
    deepspeed.init_distributed(torch.distributed.get_backend(), verbose=False)


def process_grid(tensor: int, pipeline: int, data: int) -> Any:
    """DeepSpeed's grid of ranks, with the axes pipe, data and model."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    return PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=data)


@contextmanager
def existing_groups(groups: ProcessGroups) -> Iterator[None]:
    """Context in which DeepSpeed takes groups that exist instead of creating them again.

    It would create 3 n + 2 groups on n data ranks, of which 3 n have one rank.
    """
    from deepspeed import comm

    original = comm.new_group

    def new_group(ranks: Iterable[int]) -> Any:
        asked = list(ranks)
        found = groups.find(asked)
        if found is None:
            raise RuntimeError(f"DeepSpeed asks for a group of ranks {asked}, which is on no axis")
        return found

    comm.new_group = new_group
    try:
        yield
    finally:
        comm.new_group = original
