"""What a process takes from the environment of its launcher."""

from __future__ import annotations

import pytest
import torch

from megaconsa.errors import InputError
from megaconsa.parallel import world

SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "node[07-09]",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What this process has of torch's and Slurm's variables: nothing at first."""
    found: dict[str, str] = {}
    monkeypatch.setattr(world.os, "environ", found)
    return found


def test_alone(environment: dict[str, str]) -> None:
    assert world._complete_environment() == 0
    assert [environment[name] for name in world.VARIABLES[:4]] == ["0", "1", "0", "127.0.0.1"]


def test_a_task_of_srun(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    environment |= SLURM
    assert world._complete_environment() == 1
    assert [environment[name] for name in world.VARIABLES[:4]] == ["3", "6", "1", "node07"]
    assert 10_000 <= int(environment["MASTER_PORT"]) < 30_000
    for name in world.VARIABLES:
        del environment[name]
    environment |= {"MASTER_ADDR": "head", "MASTER_PORT": "7"}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert world._complete_environment() == 0  # it sees its own GPU only
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("head", "7")


def test_a_shell_that_srun_started_may_run_torchrun(environment: dict[str, str]) -> None:
    environment |= SLURM | dict.fromkeys(world.VARIABLES, "1")
    assert world._complete_environment() == 1
    assert environment["WORLD_SIZE"] == "1"


def test_half_an_environment_is_refused(environment: dict[str, str]) -> None:
    environment["RANK"] = "0"
    with pytest.raises(InputError, match="RANK is set, but WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"):
        world._complete_environment()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="local rank 2 has no GPU: this process sees 2"):
        world._check_device(2)
