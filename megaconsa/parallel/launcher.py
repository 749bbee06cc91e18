"""Reads a process's rank and meeting point from the variables that its launcher sets.

The launchers are torchrun, deepspeed, srun and mpirun. This module does not import torch, so that a
command can find its rank before it spends seconds on that import.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass

from megaconsa.errors import InputError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that torch.distributed and DeepSpeed read."""
START_FORMAT = "%Y%m%dT%H%M%S"
"""Format of a launch ID, for time.strftime. The ID is the time when the launch began."""
MPI_PORT = 29_500
"""Default port at which the ranks of mpirun meet.

It is fixed, because mpirun passes no number that differs from launch to launch.
"""
LARGEST_PORT = 65_535
LAUNCHERS = "torchrun, deepspeed, srun or mpirun"


@dataclass(frozen=True)
class Launch:
    """A process's place in its launch, and where all processes of the launch meet."""

    rank: int
    size: int
    """Number of processes in the launch."""
    local_rank: int
    """Rank among the processes of this node."""
    address: str
    """Host of rank 0. Rank 0 or its launcher listens there."""
    port: int
    hides_gpus: bool = False
    """Whether the launcher may show each process only its own GPU (srun --gpus-per-task=1)."""

    def export(self) -> None:
        """Sets the environment variables that torch.distributed and DeepSpeed read."""
        values = (self.rank, self.size, self.local_rank, self.address, self.port)
        os.environ |= {name: str(value) for name, value in zip(VARIABLES, values, strict=True)}


@dataclass(frozen=True)
class Mpi:
    """Environment variables in which one family of mpirun numbers its processes."""

    rank: str
    size: str
    local_rank: str
    local_size: str


OPEN_MPI = Mpi(
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
HYDRA = Mpi("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
"""Variables of mpirun from MPICH and Intel MPI."""


def launch() -> Launch:
    """This process's place in its launch, from environment variables.

    A process without a launcher is alone. Raises InputError if the variables are incomplete,
    invalid or contradict each other.
    """
    environment = os.environ
    if "RANK" in environment:
        return _of_torch()
    # MPI comes before Slurm. In a job, mpirun starts its daemons with srun, and the daemons' Slurm
    # variables reach the processes. srun --mpi=pmi2 sets PMI_RANK too, but no local rank.
    for mpi in (OPEN_MPI, HYDRA):
        if mpi.rank in environment and mpi.local_rank in environment:
            return _of_mpi(mpi)
    if "SLURM_STEP_ID" in environment:
        return _of_srun()
    _refuse_half_said()
    return alone()


def is_main() -> bool:
    """Whether this process is rank 0 or alone.

    Also True if the launcher's variables are invalid.
    """
    try:
        return launch().rank == 0
    except InputError:
        return True


def first_host(nodes: str) -> str:
    """The first host in Slurm's compact list of hosts.

    Example: `node[003-005,009],other1` gives node003.
    """
    prefix, bracket, rest = nodes.partition("[")
    if not bracket or "," in prefix:
        return prefix.partition(",")[0]
    return prefix + re.split("[-,\\]]", rest, maxsplit=1)[0]


def free_port() -> str:
    """A port of this machine that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def node() -> str:
    """This machine's name. If Slurm started this process, it is Slurm's name for the machine."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _of_torch() -> Launch:
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        names = ", ".join(missing)
        raise InputError(f"RANK is set, but {names} is not; start with {LAUNCHERS}, or unset RANK")
    rank, size = _place("RANK", "WORLD_SIZE")
    return Launch(rank, size, _number("LOCAL_RANK"), os.environ["MASTER_ADDR"], _port())


def _of_mpi(mpi: Mpi) -> Launch:
    rank, size = _place(mpi.rank, mpi.size)
    if size == 1:
        return alone()
    _check_world_size(size, "mpirun")
    address = os.environ.get("MASTER_ADDR")
    if not address and _number(mpi.local_size) == size:
        address = "127.0.0.1"
    if not address:
        raise InputError(
            "mpirun started processes on several nodes, but MASTER_ADDR is not set; set it to the "
            "host of rank 0 for all of them (mpirun -x MASTER_ADDR=HOST, of MPICH and Intel MPI "
            "mpirun -genv MASTER_ADDR HOST)"
        )
    local_rank = _number(mpi.local_rank)
    return Launch(rank, size, local_rank, address, _port(MPI_PORT), hides_gpus=True)


def _of_srun() -> Launch:
    # The number of tasks of the step comes first. A shell from salloc is a single task, but its job
    # may have many.
    size_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
    rank, size = _place("SLURM_PROCID", size_name)
    if size == 1:
        return alone()
    _check_world_size(size, "srun")
    if _is_typed_into_a_shell():
        raise InputError(
            f"this shell is one of {size} tasks of srun --pty, and only it has a terminal, so that "
            f"{size - 1} ranks would never come; run srun --overlap --ntasks={size} COMMAND from "
            "it, or start the shell with srun --ntasks=1 --pty"
        )
    address = os.environ.get("MASTER_ADDR") or first_host(os.environ["SLURM_STEP_NODELIST"])
    # All nodes compute the same port. Jobs and steps that share a node usually get different ports.
    # The ports are below the range that the kernel uses for connections.
    own = 10_000 + (_number("SLURM_JOB_ID") * 16 + _number("SLURM_STEP_ID")) % 20_000
    port = _port(own)
    return Launch(rank, size, _number("SLURM_LOCALID"), address, port, hides_gpus=True)


def alone() -> Launch:
    """The launch of a process that runs alone, with a free port."""
    return Launch(0, 1, 0, "127.0.0.1", int(free_port()))


def _refuse_half_said() -> None:
    """Raises InputError if variables of a launch are set, but do not give this process's place.

    Without this check, every process of the launch would train alone.
    """
    for name, size in {"PMI_RANK": "PMI_SIZE", "PMIX_RANK": None}.items():
        if name in os.environ and (size is None or os.environ.get(size) != "1"):
            raise InputError(
                f"{name}={os.environ[name]} is set, but not what else a process must know of its "
                f"launch; start with {LAUNCHERS} (of OpenMPI, MPICH or Intel MPI), or unset {name}"
            )
    for name, lone in {"WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        if os.environ.get(name, lone) != lone:
            said = f"{name}={os.environ[name]} is set, but RANK is not"
            raise InputError(f"{said}; start with {LAUNCHERS}, or unset {name}")


def _check_world_size(size: int, launcher: str) -> None:
    said = os.environ.get("WORLD_SIZE")
    if said is not None and said != str(size):
        started = f"{launcher} started {size} processes"
        raise InputError(f"WORLD_SIZE={said} is set, but {started}; unset WORLD_SIZE")


def _is_typed_into_a_shell() -> bool:
    """Whether a person typed this command into a shell.

    A shell gives each command its own process group in the terminal's session. A task of srun has
    no terminal, or it is the first process of the session.
    """
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return os.getpgrp() != os.getsid(0)


def _place(rank_name: str, size_name: str) -> tuple[int, int]:
    """Rank and number of processes, from the variables of these names."""
    rank, size = _number(rank_name), _number(size_name)
    if rank >= size:
        said = f"{rank_name}={rank} is not below {size_name}={size}"
        raise InputError(f"{said}; start with {LAUNCHERS}, which set them")
    return rank, size


def _port(default: int | None = None) -> int:
    """MASTER_PORT, or `default` if it is not set.

    Raises InputError if it is not a port, or if neither is given.
    """
    if default is not None and not os.environ.get("MASTER_PORT"):
        return default
    port = _number("MASTER_PORT")
    if not 0 < port <= LARGEST_PORT:
        raise InputError(f"MASTER_PORT={port} is not a port; set one from 1 to {LARGEST_PORT}")
    return port


def _number(name: str) -> int:
    value = os.environ.get(name)
    if value is None:
        raise InputError(f"{name} is not set; start with {LAUNCHERS}, which set it")
    if not value.isdecimal():
        raise InputError(f"{name}={value!r} is not a number; start with {LAUNCHERS}, which set it")
    return int(value)
