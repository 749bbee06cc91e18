"""The axes of a world of processes (pipeline, data, tensor), this rank's place on each, and its groups."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch

from megaconsa.parallel.tensor import TensorParallel
from megaconsa.parallel.world import World, join


@dataclass(frozen=True)
class Mesh:
    """Where this process stands: its rank in the world and on each axis.

    World ranks count pipeline x data x tensor, the last fastest: rank = (pipeline_rank * data_ranks + data_rank) * tensor_ranks +
    tensor_rank. The ranks of a tensor group, which talk most, are neighbours; those of a pipeline are farthest apart.
    """

    world: World
    topology: Any
    """The same for DeepSpeed, whose axes are called pipe, data and model."""
    pipeline_rank: int
    pipeline_ranks: int
    data_rank: int
    data_ranks: int
    tensor: TensorParallel

    @property
    def device(self) -> torch.device:
        return self.world.device

    @property
    def is_main(self) -> bool:
        return self.world.is_main

    @property
    def reads_data(self) -> bool:
        """Whether batches enter the pipeline here; every rank of a tensor group reads the same ones."""
        return self.pipeline_rank == 0

    @property
    def counts_data(self) -> bool:
        """Whether this rank stands for its batches where they are counted once."""
        return self.reads_data and self.tensor.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds up a tensor over all ranks, in place."""
        if self.world.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, *values: float) -> list[list[float]]:
        """The values of every rank, in the order of ranks, on every rank."""
        if self.world.size == 1:
            return [list(values)]
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        every = [torch.empty_like(own) for _ in range(self.world.size)]
        torch.distributed.all_gather(every, own)
        found: list[list[float]] = torch.stack(every).tolist()
        return found

    def largest(self, value: int) -> int:
        """The largest of a number over all ranks, on every rank."""
        if self.world.size == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return int(tensor)


def initialize(
    tensor: int = 1, pipeline: int = 1, sequence: bool = True, world: World | None = None
) -> Mesh:
    """Divides the processes of the launch into ranks of each axis; joins them first where `world` is not given.

    tensor, pipeline: ranks on these axes; the rest of the world is data parallel, and Topology.of has checked that it divides.
    sequence: sequence parallelism where tensor > 1.
    """
    world = world or join()
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if world.device.type == "cpu":
        # It would be compiled at start-up, for more than a minute, to speed up all-reduces that a CPU run does not wait for.
        __compatible_ops__["deepspeed_shm_comm"] = False
    # Joins what stands already: DeepSpeed itself could not tell NCCL which device to use.
    deepspeed.init_distributed(torch.distributed.get_backend(), verbose=False)
    data_ranks = world.size // (tensor * pipeline)
    topology = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=data_ranks)
    place = topology.get_coord(world.rank)
    group = _own_group(topology.get_axis_comm_lists("model"), world.rank) if tensor > 1 else None
    return Mesh(
        world,
        topology,
        place.pipe,
        pipeline,
        place.data,
        data_ranks,
        TensorParallel(place.model, tensor, group, sequence and tensor > 1),
    )


def _own_group(groups: list[list[int]], rank: int) -> Any:
    """Creates every group, as all ranks must, and returns the one that holds `rank`."""
    created = {tuple(ranks): torch.distributed.new_group(ranks) for ranks in groups}
    return next(group for ranks, group in created.items() if rank in ranks)
