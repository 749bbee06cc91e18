"""Training under torchrun, DeepSpeed's launcher, srun and mpirun.

These tests also cover what several ranks print when they are refused and when one of them fails.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaconsa.errors import InputError
from megaconsa.parallel.launcher import HYDRA, OPEN_MPI, free_port
from megaconsa.reporting.metrics import read_metrics
from megaconsa.train import _main
from tests.support.ranks import TRAIN, ended, environment, start, write

MakeConfig = Callable[..., dict[str, Any]]
MPIS = {"openmpi": OPEN_MPI, "hydra": HYDRA}
RANK_1_FAILS = """
import sys
from megaconsa.train import _main
from megaconsa.training.trainer import Trainer

step = Trainer.step
def failing(trainer):
    if trainer.mesh.world.rank == 1 and trainer.progress.step == 2:
        raise RuntimeError("a planted error")
    return step(trainer)
Trainer.step = failing
sys.exit(_main(sys.argv[1:]))
"""


def torchrun(config: Path) -> None:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ]
    subprocess.run(
        [*launcher, *TRAIN, str(config)], check=True, capture_output=True, env=environment()
    )


def deepspeed(config: Path) -> None:
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        "2",
        "--master_port",
        free_port(),
    ]
    subprocess.run(
        [*launcher, "--module", TRAIN[1], str(config)],
        check=True,
        capture_output=True,
        env=environment(),
    )


def srun(config: Path) -> None:
    assert [task.code for task in ended(start(config, fresh=True))] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("launch", [torchrun, deepspeed, srun])
def test_two_ranks_equal_one(
    launch: Callable[[Path], Any], make_config: MakeConfig, train: Any, tmp_path: Path
) -> None:
    one = train(make_config(run={"dir": str(tmp_path / "one")}, training={"steps": 3}))
    launch(write(make_config(run={"dir": str(tmp_path / "two")}, training={"steps": 3}), tmp_path))
    two = read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)
    assert not (tmp_path / "two" / "failures").exists()


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"parallel": {"tensor": 3}},
            "error: parallel.tensor=3 does not divide model.num_key_value_heads=4; use 2 or 4\n",
        ),
        ({"data": {"path": "/nowhere/data"}}, "error: data /nowhere/data: no such folder"),
        (
            {"training": {"global_batch": 6}},
            "error: training.global_batch=6 must be a multiple of ",
        ),
    ],
    ids=["configuration", "inputs", "topology"],
)
def test_many_ranks_refuse_with_one_sentence(
    sections: dict[str, Any], said: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    values = make_config(**sections)
    main, other = ended(start(write(values, tmp_path)))
    assert (main.code, other.code) == (2, 2)
    assert main.err.startswith(said)
    assert main.err.count("\n") == 1
    assert other.err == ""
    assert not Path(values["run"]["dir"]).exists()


def test_the_first_rank_to_fail_is_heard(make_config: MakeConfig, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(RANK_1_FAILS)
    values = make_config()
    other, first = ended(start(write(values, tmp_path), [str(script)]))
    assert (first.code, other.code) == (1, 1)
    assert first.err.startswith("rank 1 of 2 on ")
    assert "in step 3:\nTraceback" in first.err
    assert first.err.endswith("RuntimeError: a planted error\n")
    last = other.err.strip().splitlines()[-1]
    assert last.startswith("rank 0 of 2 on ")
    assert "failed after another rank" in last
    assert "Traceback" not in other.err
    (folder,) = (Path(values["run"]["dir"]) / "failures").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "first.txt",
        "rank_0.txt",
        "rank_1.txt",
    ]
    assert (folder / "first.txt").read_text() == (folder / "rank_1.txt").read_text()
    assert "a planted error" in (folder / "first.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("mpi", MPIS)
def test_mpirun(mpi: str, make_config: MakeConfig, tmp_path: Path) -> None:
    """Starts two processes with the variables that mpirun sets on one node."""
    names = MPIS[mpi]
    values = make_config(training={"steps": 3})
    command = [sys.executable, *TRAIN, str(write(values, tmp_path))]
    port = {"MASTER_PORT": free_port(), "CUDA_VISIBLE_DEVICES": ""}
    tasks = [
        subprocess.Popen(
            command,
            env=environment(
                **port,
                **{names.rank: str(rank), names.size: "2"},
                **{names.local_rank: str(rank), names.local_size: "2"},
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    main, other = ended(tasks)
    assert (main.code, other.code) == (0, 0), main.err + other.err
    assert "2 ranks on 1 node, CPU" in main.out
    assert other.out == ""


@pytest.mark.parametrize("flag", ["--local_rank=0", "--local-rank=0", "--local-rank 0"])
def test_a_launchers_local_rank_is_no_field(
    flag: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    """torch.distributed.launch and DeepSpeed put the flag before the configuration.

    Other launchers put it after the configuration.
    """
    config = str(write(make_config(training={"steps": 3}), tmp_path))
    for arguments in ([*flag.split(), config, "run.seed=1"], [config, *flag.split(), "run.seed=1"]):
        assert _main(arguments) == 0
    with pytest.raises(InputError, match="give a configuration"):
        _main(flag.split())


def test_a_port_in_use_ends_the_launch(make_config: MakeConfig, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        variables = {"MASTER_PORT": str(taken.getsockname()[1]), "CUDA_VISIBLE_DEVICES": ""}
        task = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
        node = {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
        main = subprocess.run(
            [sys.executable, *TRAIN, str(write(make_config(), tmp_path))],
            env=environment(**variables, **task, **node),
            capture_output=True,
            text=True,
            check=False,
        )
    assert main.returncode == 76
    said = f"error: MASTER_PORT={variables['MASTER_PORT']} of this machine, where the ranks are to "
    assert main.stderr.splitlines()[-1].startswith(said + "meet, is taken by another process; set")
    assert not (tmp_path / "run").exists()


def test_ranks_that_cannot_know_their_place(make_config: MakeConfig, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, *TRAIN, str(write(make_config(), tmp_path))],
        env=environment(WORLD_SIZE="8"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: WORLD_SIZE=8 is set, but RANK is not; start with ")
    assert ended.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
