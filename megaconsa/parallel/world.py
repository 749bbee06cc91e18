"""The processes that train together: joining them, refusing together, leaving."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed as dist

from megaconsa.errors import InputError

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """All processes of a launch, and this one's place among them."""

    rank: int
    size: int
    device: torch.device
    launch: str
    """When it began, as a name that sorts by time and is the same on every rank: 20261124T112233."""

    @property
    def is_main(self) -> bool:
        """Whether this rank writes logs and shared files."""
        return self.rank == 0

    def agreed(self, check: Callable[[], Result]) -> Result:
        """The result of `check`, called on every rank, if none refuses with InputError.

        Otherwise all ranks end together: the main one with InputError of what was said, each sentence once, the others without a word
        and exit code 2.
        """
        result, refusal = None, None
        try:
            result = check()
        except InputError as error:
            refusal = str(error)
        refusals: list[str | None] = [None] * self.size
        dist.all_gather_object(refusals, refusal)
        said = {text: [rank for rank, own in enumerate(refusals) if own == text] for text in refusals if text is not None}
        if not said:
            return result  # type: ignore[return-value]
        leave()
        if not self.is_main:
            raise SystemExit(2)
        raise InputError("; ".join(text + self._named(ranks) for text, ranks in said.items()))

    def _named(self, ranks: list[int]) -> str:
        return "" if len(ranks) == self.size else f" (on rank {', '.join(map(str, ranks))} of {self.size})"


def join() -> World:
    """Joins the process group (NCCL on GPUs, gloo on CPUs) that torchrun, deepspeed or srun describe; alone it is a world of one."""
    local_rank = _complete_environment()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    began = torch.tensor(int(time.time()), device=device)
    dist.broadcast(began, 0)
    launch = time.strftime("%Y%m%dT%H%M%S", time.localtime(int(began)))
    return World(dist.get_rank(), dist.get_world_size(), device, launch)


def leave() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _complete_environment() -> int:
    """Fills in what torch.distributed reads and a lone process or srun does not set; returns the local rank."""
    environment = os.environ
    if "RANK" in environment:
        missing = [name for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if missing:
            raise InputError(
                f"RANK is set, but {', '.join(missing)} is not; start with torchrun, deepspeed or srun, or unset RANK"
            )
    elif "SLURM_STEP_ID" in environment:  # a task of srun, not of a shell that it started
        for name, slurm in {"RANK": "PROCID", "WORLD_SIZE": "NTASKS", "LOCAL_RANK": "LOCALID"}.items():
            environment[name] = environment[f"SLURM_{slurm}"]
        environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
        # The same on all nodes, and another for each job and step of a node. Below the range the kernel takes for connections.
        job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
        environment.setdefault("MASTER_PORT", str(10_000 + (job * 16 + step) % 20_000))
    else:
        environment |= {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": _free_port(),
        }
    return int(environment["LOCAL_RANK"])


def first_host(nodes: str) -> str:
    """The first of Slurm's compact list of hosts: node003 of `node[003-005,009],other1`."""
    prefix, bracket, rest = nodes.partition("[")
    if not bracket or "," in prefix:
        return prefix.partition(",")[0]
    return prefix + re.split("[-,\\]]", rest, maxsplit=1)[0]


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
