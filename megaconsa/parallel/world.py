"""The processes that train together: joining them, refusing together, leaving."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from torch import distributed as dist

from megaconsa.errors import InputError
from megaconsa.exit_codes import REFUSED

Result = TypeVar("Result")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torch.distributed and DeepSpeed read of the environment."""
BACKGROUND_TIMEOUT = timedelta(hours=2)
"""For ranks that wait until one of them has read, or the slowest has written, a large checkpoint."""


@dataclass(frozen=True)
class World:
    """All processes of a launch, and this one's place among them."""

    rank: int
    size: int
    device: torch.device
    background: Any
    """torch.distributed's group of all ranks on gloo, patient, for start-up and for threads beside the training; None if alone."""
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
        if self.size == 1:
            return check()
        result, refusal = _attempt(check)
        refusals: list[str | None] = self.exchange(refusal)
        said = {text: [rank for rank, own in enumerate(refusals) if own == text] for text in refusals if text is not None}
        if said:
            self._refuse("; ".join(text + self._named(ranks) for text, ranks in said.items()))
        return result  # type: ignore[return-value]

    def from_main(self, find: Callable[[], Result]) -> Result:
        """The result of `find`, called on the main rank alone, on every rank. What it refuses ends all ranks as `agreed` does."""
        if self.size == 1:
            return find()
        result, refusal = self.exchange(_attempt(find) if self.is_main else None)[0]
        if refusal is not None:
            self._refuse(refusal)
        found: Result = result
        return found

    def exchange(self, value: Any) -> list[Any]:
        """One value of each rank, in the order of ranks, on every rank. It meets none of the training's collectives: for start-up, and
        from then on for one thread beside the training."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.background)
        return values

    def _refuse(self, said: str) -> NoReturn:
        leave()
        if self.is_main:
            raise InputError(said)
        raise SystemExit(REFUSED)

    def _named(self, ranks: list[int]) -> str:
        return "" if len(ranks) == self.size else f" (on rank {', '.join(map(str, ranks))} of {self.size})"


ALONE = World(0, 1, torch.device("cpu"), None, "")
"""This process by itself."""


def _attempt(function: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """The result, or what was refused."""
    try:
        return function(), None
    except InputError as error:
        return None, str(error)


def join() -> World:
    """Joins the process group (NCCL on GPUs, gloo on CPUs) that torchrun, deepspeed or srun describe; alone it is a world of one."""
    local_rank = _complete_environment()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        _check_device(local_rank)
        torch.cuda.set_device(device)
        # DeepSpeed's pipeline sends one tensor at a time; that this is no batch is nothing a user could mend.
        os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
    # Collectives that each rank remembers, for the watchdog to write down.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    began = torch.tensor(int(time.time()), device=device)
    dist.broadcast(began, 0)
    launch = time.strftime("%Y%m%dT%H%M%S", time.localtime(int(began)))
    size = dist.get_world_size()
    background = dist.new_group(backend="gloo", timeout=BACKGROUND_TIMEOUT) if size > 1 else None
    return World(dist.get_rank(), size, device, background, launch)


def _check_device(local_rank: int) -> None:
    if local_rank >= torch.cuda.device_count():
        raise InputError(
            f"local rank {local_rank} has no GPU: this process sees {torch.cuda.device_count()}; start as many processes a node as it "
            "has GPUs"
        )


def leave() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _complete_environment() -> int:
    """Fills in what torch.distributed reads and a lone process or srun does not set; returns the local rank."""
    environment = os.environ
    if "RANK" in environment:
        missing = [name for name in VARIABLES if name not in environment]
        if missing:
            raise InputError(
                f"RANK is set, but {', '.join(missing)} is not; start with torchrun, deepspeed or srun, or unset RANK"
            )
    elif "SLURM_STEP_ID" in environment:  # a task of srun, not of a shell that it started
        for name, slurm in {"RANK": "PROCID", "WORLD_SIZE": "NTASKS", "LOCAL_RANK": "LOCALID"}.items():
            environment[name] = environment[f"SLURM_{slurm}"]
        if torch.cuda.device_count() == 1:  # each task sees its own only (--gpus-per-task=1)
            environment["LOCAL_RANK"] = "0"
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
            "MASTER_PORT": free_port(),
        }
    return int(environment["LOCAL_RANK"])


def first_host(nodes: str) -> str:
    """The first of Slurm's compact list of hosts: node003 of `node[003-005,009],other1`."""
    prefix, bracket, rest = nodes.partition("[")
    if not bracket or "," in prefix:
        return prefix.partition(",")[0]
    return prefix + re.split("[-,\\]]", rest, maxsplit=1)[0]


def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
