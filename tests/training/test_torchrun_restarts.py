"""torchrun restarts all ranks after one was killed.

The run then ends as if nothing had happened.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megaconsa.parallel.launcher import free_port
from megaconsa.reporting.metrics import read_metrics
from tests.support.forked_ranks import launch
from tests.support.interruptions import contents
from tests.support.ranks import TRAIN, await_step, ended, environment, write

MakeConfig = Callable[..., dict[str, Any]]
STEPS = 40
C10D = ["--rdzv-backend", "c10d", "--rdzv-id", "1", "--rdzv-endpoint", "127.0.0.1:PORT"]
LAUNCHES = {
    "static": [["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", "PORT"]],
    "c10d": [["--nproc-per-node", "2", *C10D]],
    "nodes": [["--nproc-per-node", "1", "--nnodes", "2", *C10D]] * 2,
}
"""Options of torchrun, for each torchrun of a launch.

With two nodes, each node counts its own restarts.
"""


def torchruns(kind: str, config: Path) -> list[subprocess.Popen[str]]:
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "1"]
            + [option.replace("PORT", port) for option in options]
            + [*TRAIN, str(config)],
            env=environment(CUDA_VISIBLE_DEVICES=""),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for options in LAUNCHES[kind]
    ]


def processes(launchers: list[subprocess.Popen[str]]) -> dict[str, int]:
    """Process IDs of the ranks of the launchers."""
    found = {}
    for launcher in launchers:
        for task in Path(f"/proc/{launcher.pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                own = [entry[5:].decode() for entry in variables if entry.startswith(b"RANK=")]
                found |= dict.fromkeys(own, int(child))
    return found


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run / "metrics.jsonl")]


NODES = pytest.param("nodes", marks=pytest.mark.nightly)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["static", "c10d", NODES])
def test_a_killed_rank_is_started_again(kind: str, make_config: MakeConfig, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    whole = tmp_path / "whole"

    def values(run: Path) -> dict[str, Any]:
        every = {"every": 10}
        return make_config(run={"dir": str(run)}, training={"steps": STEPS}, checkpoint=every)

    launchers = torchruns(kind, write(values(killed), tmp_path))
    await_step(killed, STEPS // 2)
    os.kill(processes(launchers)["1"], signal.SIGKILL)
    for launcher in ended(launchers):
        assert launcher.code == 0, launcher.err
    assert (killed / "failures").exists()
    launch(2, [{"config": values(whole), "fault": None, "kernels": False, "stop": None}])
    assert not (whole / "failures").exists()
    assert losses(killed) == losses(whole)
    assert contents(killed) == contents(whole)
