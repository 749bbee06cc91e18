"""What a process reads from its launcher's environment variables, and what it refuses there."""

from __future__ import annotations

import os
import pty
import sys

import pytest

from megaconsa.errors import InputError
from megaconsa.parallel import launcher
from megaconsa.parallel.launcher import Launch, first_host

SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "node[07-09]",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_RANK": "3",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "7",
}
DAEMON = {**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
"""The variables that mpirun's processes inherit.

They come from the srun that started mpirun's daemon on the node.
"""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The launcher's variables of this process. There are none at first."""
    found: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", found)
    return found


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"MASTER_ADDR": "node07", "MASTER_PORT": "12345"},
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
        OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
    ],
    ids=["nothing", "one", "address", "step", "pmi", "mpi"],
)
def test_alone(variables: dict[str, str], environment: dict[str, str]) -> None:
    """Covers a shell of salloc, which is a step of one task in a job of six."""
    environment |= variables
    found = launcher.launch()
    assert (found.rank, found.size, found.local_rank, found.address) == (0, 1, 0, "127.0.0.1")
    assert launcher.is_main()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (SRUN, Launch(3, 6, 1, "node07", 10_000 + 1234 * 16 + 2, hides_gpus=True)),
        (
            {**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "7"},
            Launch(3, 6, 1, "head", 7, hides_gpus=True),
        ),
        ({**SRUN, "PMI_RANK": "3", "PMI_SIZE": "6"}, Launch(3, 6, 1, "node07", 29746, True)),
        (OPEN_MPI, Launch(3, 4, 3, "127.0.0.1", 29_500, hides_gpus=True)),
        (DAEMON | OPEN_MPI, Launch(3, 4, 3, "127.0.0.1", 29_500, hides_gpus=True)),
        (
            {**DAEMON, **HYDRA, "MASTER_ADDR": "head", "MASTER_PORT": "9"},
            Launch(3, 4, 1, "head", 9, hides_gpus=True),
        ),
        (SRUN | TORCHRUN, Launch(1, 2, 1, "head", 7)),
        (OPEN_MPI | TORCHRUN, Launch(1, 2, 1, "head", 7)),
    ],
    ids=["srun", "address", "pmi2", "openmpi", "openmpi_in_job", "hydra", "shell", "nested"],
)
def test_place(variables: dict[str, str], expected: Launch, environment: dict[str, str]) -> None:
    environment |= variables
    assert launcher.launch() == expected
    assert not launcher.is_main()


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "0"}, "RANK is set, but WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8 is set, but RANK is not; start with torchrun"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK=3 is set, but RANK is not"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "PMI_RANK=1 is set, but not what else"),
        ({"PMIX_RANK": "0"}, "PMIX_RANK=0 is set, but not what else"),
        (HYDRA, "on several nodes, but MASTER_ADDR is not set; set it to the host of rank 0"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE is not set"),
        ({**SRUN, "WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but srun started 6 processes"),
        ({**OPEN_MPI, "WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, but mpirun started 4 processes"),
        ({**TORCHRUN, "RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        ({**TORCHRUN, "RANK": "one"}, "RANK='one' is not a number"),
        ({**TORCHRUN, "MASTER_ADDR": ""}, "RANK is set, but MASTER_ADDR is not"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not a port; set one from 1"),
        ({**SRUN, "MASTER_PORT": "0"}, "MASTER_PORT=0 is not a port"),
    ],
)
def test_refused(variables: dict[str, str], said: str, environment: dict[str, str]) -> None:
    environment |= variables
    with pytest.raises(InputError, match=said):
        launcher.launch()


ASK = f"""{sys.executable} -c '
from megaconsa.console import guarded
from megaconsa.parallel import launcher
guarded(lambda: print(launcher.launch()))'
"""


def test_a_command_typed_into_one_of_many_tasks() -> None:
    """The shell is that of srun --ntasks=6 --pty bash."""
    said = in_terminal(["bash", "--norc", "--noprofile", "-i"], ASK + "exit\n")
    assert "error: this shell is one of 6 tasks of srun --pty" in said
    assert "run srun --overlap --ntasks=6 COMMAND" in said


def test_a_task_in_a_terminal() -> None:
    """srun --ntasks=6 --pty bash SCRIPT is a launch like any other."""
    said = in_terminal(["bash", "-c", ASK + "exit"], "")
    assert "Launch(rank=3, size=6, local_rank=1, address='node07'" in said


def in_terminal(command: list[str], typed: str) -> str:
    """Runs a command that leads the session of a terminal.

    Returns what appears in the terminal.
    """
    child, terminal = pty.fork()
    if child == 0:
        # Do not pass the whole environment. Tests before this one leave a launch in it.
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TERM") if name in os.environ}
        os.execvpe(command[0], command, kept | SRUN)
    os.write(terminal, typed.encode())
    said = b""
    try:
        while part := os.read(terminal, 4096):
            said += part
    except OSError:  # the terminal has no other end any more
        pass
    os.waitpid(child, 0)
    os.close(terminal)
    return " ".join(said.decode().split())


def test_first_host() -> None:
    lists = {
        "node7": "node7",
        "a,b": "a",
        "node[003-005,009],x1": "node003",
        "gpu-[12,15]": "gpu-12",
        "a1,b[2-3]": "a1",
    }
    assert {nodes: first_host(nodes) for nodes in lists} == lists
