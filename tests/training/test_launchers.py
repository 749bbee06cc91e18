"""Training under torchrun, DeepSpeed's launcher and srun; what several ranks print when they are refused, and when one fails."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaconsa.parallel.world import VARIABLES, first_host, free_port
from megaconsa.reporting.metrics import read_metrics

MakeConfig = Callable[..., dict[str, Any]]
TRAIN = ("-m", "megaconsa.train")
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


def environment(**variables: str) -> dict[str, str]:
    """Without what tests that trained in this process have left behind."""
    return {name: value for name, value in os.environ.items() if name not in VARIABLES} | {"OMP_NUM_THREADS": "1"} | variables


def torchrun(config: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launcher, *TRAIN, str(config)], check=True, capture_output=True, env=environment())


def deepspeed(config: Path) -> None:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", free_port()]
    subprocess.run([*launcher, "--module", TRAIN[1], str(config)], check=True, capture_output=True, env=environment())


def srun(config: Path, command: Sequence[str] = TRAIN) -> list[tuple[int, str]]:
    """Two tasks with the variables that srun sets and nobody who ends the others; exit code and stderr of each."""
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    port = {"MASTER_PORT": free_port()}  # the one that a job's number gives may be taken on a machine that has no Slurm
    tasks = [
        subprocess.Popen(
            [sys.executable, *command, str(config)],
            env=environment(**step, **port, SLURM_PROCID=rank, SLURM_LOCALID=rank),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    return [(task.returncode, output[1]) for task, output in [(task, task.communicate(timeout=120)) for task in tasks]]


def write(values: dict[str, Any], folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("launch", [torchrun, deepspeed, srun])
def test_two_ranks_equal_one(launch: Callable[[Path], Any], make_config: MakeConfig, train: Any, tmp_path: Path) -> None:
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
            "error: parallel.tensor=3 does not divide model.num_key_value_heads=4; use a number that does\n",
        ),
        ({"data": {"path": "/nowhere/data"}}, "error: data /nowhere/data: no such folder"),
        ({"training": {"global_batch": 6}}, "error: training.global_batch=6 must be a multiple of "),
    ],
    ids=["configuration", "inputs", "topology"],
)
def test_many_ranks_refuse_with_one_sentence(
    sections: dict[str, Any], said: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    values = make_config(**sections)
    (main, main_said), (other, other_said) = srun(write(values, tmp_path))
    assert (main, other) == (2, 2)
    assert main_said.startswith(said)
    assert main_said.count("\n") == 1
    assert other_said == ""
    assert not Path(values["run"]["dir"]).exists()


def test_the_first_rank_to_fail_is_heard(make_config: MakeConfig, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(RANK_1_FAILS)
    values = make_config()
    (other, other_said), (first, first_said) = srun(write(values, tmp_path), [str(script)])
    assert (first, other) == (1, 1)
    assert first_said.startswith("rank 1 of 2 on ")
    assert "in step 3:\nTraceback" in first_said
    assert first_said.endswith("RuntimeError: a planted error\n")
    last = other_said.strip().splitlines()[-1]
    assert last.startswith("rank 0 of 2 on ")
    assert "failed after another rank" in last
    assert "Traceback" not in other_said
    (folder,) = (Path(values["run"]["dir"]) / "failures").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["first.txt", "rank_0.txt", "rank_1.txt"]
    assert (folder / "first.txt").read_text() == (folder / "rank_1.txt").read_text()
    assert "a planted error" in (folder / "first.txt").read_text()


def test_first_host() -> None:
    lists = {"node7": "node7", "a,b": "a", "node[003-005,009],x1": "node003", "gpu-[12,15]": "gpu-12", "a1,b[2-3]": "a1"}
    assert {nodes: first_host(nodes) for nodes in lists} == lists
