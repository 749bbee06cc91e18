"""Processes and their places: the world, this rank's device, the axes (pipeline, data, tensor) and its rank on each."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from typing import Any

import torch

from megaconsa.errors import InputError


@dataclass(frozen=True)
class Mesh:
    """Where this process stands. `topology` is DeepSpeed's, in the order pipe, data, model (the last changes fastest)."""

    rank: int
    world_size: int
    device: torch.device
    topology: Any
    data_rank: int
    data_ranks: int

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs and shared files."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds up a tensor over all ranks, in place."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor


def initialize(tensor: int = 1, pipeline: int = 1) -> Mesh:
    """Joins the process group (NCCL on GPUs, gloo on CPUs) that torchrun, deepspeed or srun describe; alone it is a world of one."""
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
        raise InputError(f"{world_size} processes cannot be divided by parallel.tensor={tensor} x parallel.pipeline={pipeline}")
    data_ranks = world_size // (tensor * pipeline)
    topology = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=data_ranks)
    rank = torch.distributed.get_rank()
    return Mesh(rank, world_size, device, topology, topology.get_coord(rank).data, data_ranks)


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
