"""Training under torchrun, DeepSpeed's launcher and srun; what several ranks print when they are refused, and when one fails."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import TRAIN, ended, environment, start, write

from megaconsa.parallel.world import first_host, free_port
from megaconsa.reporting.metrics import read_metrics

MakeConfig = Callable[..., dict[str, Any]]
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
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launcher, *TRAIN, str(config)], check=True, capture_output=True, env=environment())


def deepspeed(config: Path) -> None:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", free_port()]
    subprocess.run([*launcher, "--module", TRAIN[1], str(config)], check=True, capture_output=True, env=environment())


def srun(config: Path) -> None:
    assert [task.code for task in ended(start(config))] == [0, 0]


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
    assert sorted(path.name for path in folder.iterdir()) == ["first.txt", "rank_0.txt", "rank_1.txt"]
    assert (folder / "first.txt").read_text() == (folder / "rank_1.txt").read_text()
    assert "a planted error" in (folder / "first.txt").read_text()


def test_first_host() -> None:
    lists = {"node7": "node7", "a,b": "a", "node[003-005,009],x1": "node003", "gpu-[12,15]": "gpu-12", "a1,b[2-3]": "a1"}
    assert {nodes: first_host(nodes) for nodes in lists} == lists
