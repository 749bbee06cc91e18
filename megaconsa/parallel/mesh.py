"""Processes and their places: the world, this rank's device, the axes (pipeline, data, tensor) and its rank on each."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from typing import Any

import torch

from megaconsa.errors import InputError
from megaconsa.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class Mesh:
    """Where this process stands: its rank in the world and on each axis.

    World ranks count pipeline x data x tensor, the last fastest: rank = (pipeline_rank * data_ranks + data_rank) * tensor_ranks +
    tensor_rank. The ranks of a tensor group, which talk most, are neighbours; those of a pipeline are farthest apart.
    """

    rank: int
    world_size: int
    device: torch.device
    topology: Any
    """The same for DeepSpeed, whose axes are called pipe, data and model."""
    pipeline_rank: int
    pipeline_ranks: int
    data_rank: int
    data_ranks: int
    tensor: TensorParallel

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs and shared files."""
        return self.rank == 0

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
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor


def initialize(tensor: int = 1, pipeline: int = 1, sequence: bool = True) -> Mesh:
    """Joins the process group (NCCL on GPUs, gloo on CPUs) that torchrun, deepspeed or srun describe; alone it is a world of one.

    tensor, pipeline: ranks on these axes, the rest of the world is data parallel; sequence: sequence parallelism where tensor > 1.
    """
    local_rank = _complete_environment()
    cuda = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if cuda:
        torch.cuda.set_device(local_rank)
    else:
        # It would be compiled at start-up, for more than a minute, to speed up all-reduces that a CPU run does not wait for.
        __compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if not torch.distributed.is_initialized():
        # Begun here and only joined by DeepSpeed, which cannot say which device NCCL is to use.
        torch.distributed.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
        deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False)
    world_size = torch.distributed.get_world_size()
    if world_size % (tensor * pipeline):
        raise InputError(
            f"{world_size} processes cannot be divided by parallel.tensor={tensor} x parallel.pipeline={pipeline}; "
            f"start a multiple of {tensor * pipeline}, or lower one of them"
        )
    data_ranks = world_size // (tensor * pipeline)
    topology = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=data_ranks)
    rank = torch.distributed.get_rank()
    place = topology.get_coord(rank)
    group = _own_group(topology.get_axis_comm_lists("model"), rank) if tensor > 1 else None
    return Mesh(
        rank,
        world_size,
        device,
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


def shut_down() -> None:
    """Leaves the process group."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _complete_environment() -> int:
    """Fills in what torch.distributed reads and a lone process or srun does not set; returns the local rank."""
    slurm = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    under_srun = "SLURM_STEP_ID" in os.environ and "RANK" not in os.environ
    for name, source in slurm.items():
        os.environ.setdefault(name, os.environ.get(source, "0") if under_srun else ("1" if name == "WORLD_SIZE" else "0"))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ and os.environ["WORLD_SIZE"] == "1":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    return int(os.environ["LOCAL_RANK"])
